"""Linear layers by oneDNN compute what PyTorch and PEFT do."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from driftrl.build import build_policy
from driftrl.policies import fast_linear

pytestmark = pytest.mark.skipif(
    not fast_linear.available(nn.Linear(1, 1)), reason="this PyTorch has no oneDNN"
)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.target, self.bare = nn.Linear(7, 6), nn.Linear(6, 5), nn.Linear(5, 4, bias=False)

    def forward(self, x):
        return self.bare(torch.tanh(self.target(torch.tanh(self.first(x)))))


def two(**settings):
    """The same random network with the same LoRA, as PEFT computes it and as we do."""
    out = []
    for fast in (False, True):
        torch.manual_seed(0)
        network = Layers().requires_grad_(False)
        model = get_peft_model(
            network, LoraConfig(target_modules=["target"], init_lora_weights=False, **settings)
        )
        if fast:
            fast_linear.install(model)
        out.append(model)
    return out


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 7), (1, 1, 7), (0, 7)])
@pytest.mark.parametrize("rank", [1, 4])
def test_values_and_gradients_are_those_of_peft(shape, rank):
    theirs, ours = two(r=rank, lora_alpha=3.0)
    torch.manual_seed(1)
    x = torch.randn(shape)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [model(own) for model, own in zip((theirs, ours), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)
    for output in outputs:
        output.pow(3).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, atol=1e-4, rtol=1e-4)
    for (name, mine), yours in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) == (yours.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, yours.grad, atol=1e-4, rtol=1e-4)


def test_a_switched_off_adapter_leaves_the_base_network():
    theirs, ours = two(r=2)
    x = torch.randn(5, 7)
    with theirs.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-5)
    assert (ours(x) - theirs(x)).abs().max() < 1e-4


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_layers_that_do_more_stay_as_they_are(settings):
    theirs, ours = two(r=2, **settings)
    theirs.eval(), ours.eval()
    x = torch.randn(5, 7)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_the_layers_of_a_policy_are_in_use_and_follow_its_weights(config):
    policy = build_policy(config())
    layers = [
        m for m in policy.network.modules() if isinstance(m.__dict__.get("forward"), fast_linear._LoRAForward)
    ]
    assert len(layers) == sum("lora_A" in name for name, _ in policy.named_parameters())
    conditioning = policy.encode(["a cat"])
    x, step = torch.randn(1, *policy.latent_shape), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        before = policy.transition(x, step, conditioning).mean
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        after = policy.transition(x, step, conditioning).mean
        with policy.reference():
            again = policy.transition(x, step, conditioning).mean
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(again, before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("what", ["merged", "another", "both"])
def test_an_adapter_that_is_fused_or_not_alone_is_as_in_peft(what):
    """As users of a trained pipeline in memory may have it."""
    x, outputs = torch.randn(3, 7, generator=torch.Generator().manual_seed(1)), []
    for model in two():
        torch.manual_seed(2)
        if what == "merged":
            model.merge_adapter()
        else:
            model.add_adapter("more", LoraConfig(target_modules=["target"], init_lora_weights=False))
            model.base_model.set_adapter("more" if what == "another" else ["default", "more"])
        outputs.append(model(x))
    torch.testing.assert_close(outputs[1], outputs[0])
