"""The fast form of a UNet computes what diffusers and PEFT do, forward and backward."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional as F

from driftrl.build import build_policy
from driftrl.config import load_config
from driftrl.policies import fast_linear, fast_unet, frozen, winograd
from driftrl.policies.lora import add_lora
from driftrl.rollout import PromptNoise, rollout, score_step
from driftrl.transitions import gaussian

pytestmark = pytest.mark.skipif(
    not fast_linear.available(nn.Linear(1, 1)), reason="this PyTorch has no oneDNN"
)

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_FIRST = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
TEXT_LATER = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
SHAPES = {
    "text first": {**TEXT_FIRST, "block_out_channels": (16, 32)},
    "text later, so branches share a block": {**TEXT_LATER, "block_out_channels": (16, 32)},
    "wide enough for Winograd": {**TEXT_LATER, "block_out_channels": (32, 96)},
    "linear projections, two layers": {**TEXT_FIRST, "block_out_channels": (16, 32), "layers_per_block": 2, "use_linear_projection": True},
}  # fmt: skip


def network(targets=ATTENTION, **shape):
    """A small random UNet with a LoRA that does something."""
    torch.manual_seed(0)
    settings = {
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    unet = UNet2DConditionModel(sample_size=16, **{**settings, **(shape or SHAPES["text first"])}).eval()
    add_lora(unet, 2, 3.0, targets, 0)
    unet.to(memory_format=torch.channels_last)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.requires_grad or name.endswith(("norm1.weight", "norm2.bias")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


def fast_form(unet):
    """A copy of it with fast layers, and its fast form."""
    own = copy.deepcopy(unet)
    fast_linear.install(own)
    return own, fast_unet.build(own)


def inputs(size=16, branches=2):
    torch.manual_seed(1)
    return torch.randn(3, 4, size, size), torch.tensor([3, 400, 999]), torch.randn(branches * 3, 5, 16)


def stock(unet, latents, times, embeds):
    branches = len(embeds) // len(latents)
    return unet(latents.repeat(branches, 1, 1, 1), times.repeat(branches), embeds, return_dict=False)[0]


def gradients(unet, output):
    """Of a loss that treats every output differently, all in one vector."""
    unet.zero_grad(set_to_none=True)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output * weights.to(output.dtype)).sum().backward()
    return torch.cat([p.grad.flatten() for p in unet.parameters() if p.requires_grad])


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients_are_as_near_the_truth_as_those_of_diffusers_and_peft(shape, branches):
    theirs = network(**shape)
    own, fast = fast_form(theirs)
    latents, times, embeds = inputs(branches=branches)
    truth = copy.deepcopy(theirs).double()
    exact = stock(truth, latents.double(), times, embeds.double())
    exact_gradient = gradients(truth, exact)
    for unet, output in (
        (theirs, stock(theirs, latents, times, embeds)),
        (own, fast(latents, times, embeds)),
    ):
        assert (output - exact).abs().max() < 1e-5 * exact.abs().max()
        gradient = gradients(unet, output)
        assert (gradient - exact_gradient).norm() < 1e-5 * exact_gradient.norm()


@pytest.mark.parametrize("adapter", [True, False], ids=["with its adapter", "without"])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_of_latents_are_as_near_the_truth(shape, branches, adapter):
    """They lead back along a path (`driftrl.pathwise`); by the base model, none of whose weights has one."""
    theirs = network(**shape)
    own, fast = fast_form(theirs)
    latents, times, embeds = inputs(branches=branches)
    truth = copy.deepcopy(theirs).double()
    for unet in (own, truth):
        if not adapter:
            unet.disable_adapters()
    weights = torch.randn(branches * 3, 4, 16, 16, generator=torch.Generator().manual_seed(2))

    def led_back(run, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad((run(x) * weights.to(x.dtype)).sum(), x)[0]

    exact = led_back(lambda x: stock(truth, x, times, embeds.double()), latents.double())
    found = led_back(lambda x: fast(x, times, embeds), latents)
    assert (found - exact).norm() < 1e-5 * exact.norm()


def test_without_gradients_it_computes_the_same_bits():
    _, fast = fast_form(network(**SHAPES["wide enough for Winograd"]))
    with torch.no_grad():
        plain = fast(*inputs())
    assert torch.equal(fast(*inputs()).detach(), plain)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_row_does_not_depend_on_its_neighbours(shape):
    _, fast = fast_form(network(**shape))
    latents, times, embeds = inputs()
    with torch.no_grad():
        together = fast(latents, times, embeds).unflatten(0, (2, 3))[:, 1]
        alone = fast(latents[1:2], times[1:2], embeds[1::3])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)


def test_it_follows_the_adapter_and_its_switch():
    own, fast = fast_form(network())
    with torch.no_grad():
        before = fast(*inputs())
        own.disable_adapters()
        torch.testing.assert_close(fast(*inputs()), stock(own, *inputs()), atol=1e-5, rtol=1e-5)
        assert (fast(*inputs()) - before).abs().max() > 1e-3
        own.enable_adapters()
        for name, parameter in own.named_parameters():
            if "lora_B" in name:
                parameter.neg_()
        torch.testing.assert_close(fast(*inputs()), stock(own, *inputs()), atol=1e-5, rtol=1e-5)
        assert (fast(*inputs()) - before).abs().max() > 1e-3


def test_a_lora_on_the_feed_forward_layers_is_trained():
    theirs = network([*ATTENTION, "net.0.proj", "net.2"], **SHAPES["text first"])
    own, fast = fast_form(theirs)
    ours = gradients(own, fast(*inputs()))
    torch.testing.assert_close(ours, gradients(theirs, stock(theirs, *inputs())), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("targets", [["conv1"], ["time_emb_proj"], ["proj_in"], ["conv_in"]])
def test_networks_that_train_other_layers_are_left_alone(targets):
    assert fast_form(network(targets))[1] is None


@pytest.mark.parametrize(
    "changes",
    [
        {"class_embed_type": "timestep"},
        {"resnet_time_scale_shift": "scale_shift"},
        {"act_fn": "gelu"},
        {"only_cross_attention": True},
        {"down_block_types": ("CrossAttnDownBlock2D", "AttnDownBlock2D")},
        {"dropout": 0.5},
        {"mid_block_type": None},
    ],
)
def test_other_networks_are_left_alone(changes):
    unet = network(**{**SHAPES["text first"], **changes})
    fast_linear.install(unet)
    assert fast_unet.build(unet) is None


def test_a_network_that_computes_something_else_is_left_alone():
    unet = network()
    unet.conv_out.register_forward_hook(lambda module, given, output: 1.01 * output)
    fast_linear.install(unet)
    assert fast_unet.build(unet) is None


def test_a_policy_uses_it_where_it_can(config):
    policy = build_policy(config())
    conditioning = policy.encode(["a cat", "a dog"])
    latents, steps = torch.randn(2, *policy.latent_shape), torch.tensor([0, 1])

    def mean():
        return policy.transition(latents, steps, conditioning).mean.detach()

    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    fast = mean()
    assert policy.fast is not None and policy.fast.fits(latents)
    assert not policy.fast.fits(torch.zeros(1, 4, 7, 8))
    policy.fast = None
    torch.testing.assert_close(mean(), fast, atol=1e-5, rtol=1e-5)
    assert build_policy(config(model__gradient_checkpointing=True))._fast(latents) is None


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("skipped", [8, 16, 24])
def test_a_residual_block_with_a_skip_connection(skipped, learns, shared):
    torch.manual_seed(0)
    block = ResnetBlock2D(
        in_channels=24 + skipped, out_channels=16, temb_channels=5, groups=8
    ).requires_grad_(False)
    fast = fast_unet._Residual(block, True)
    x, skip = torch.randn(4, 24, 8, 8), torch.randn(2 if shared else 4, skipped, 8, 8)
    time = torch.randn(4, 5)
    found = []
    for ours in (False, True):
        own, over = x.clone().requires_grad_(), skip.clone().requires_grad_(learns)
        if ours:
            out = fast(own, over, F.silu(time))
        else:
            out = block(torch.cat([own, over.repeat(2, 1, 1, 1) if shared else over], 1), time)
        out.pow(2).sum().backward()
        found.append((out.detach(), own.grad, over.grad))
    for mine, yours in zip(*found, strict=True):
        assert (mine is None) == (yours is None)
        if mine is not None:
            torch.testing.assert_close(yours, mine, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(4, 4), (8, 4), (8, 8), (12, 8), (6, 8)])
def test_winograd_is_the_convolution(size):
    torch.manual_seed(0)
    layer = nn.Conv2d(20, 24, 3, padding=1).to(memory_format=torch.channels_last).requires_grad_(False)
    x = torch.randn(3, 20, *size, dtype=torch.float64, requires_grad=True)
    exact = F.conv2d(x, layer.weight.double(), layer.bias.double(), padding=1)
    gradient = torch.randn_like(exact)
    exact.backward(gradient)
    fast = winograd.Winograd(layer)
    dense = torch.channels_last
    out = fast(x.detach().float().contiguous(memory_format=dense))
    torch.testing.assert_close(out.double(), exact.detach(), atol=2e-5, rtol=0)
    for channels in (7, 20):
        back = fast.back(gradient.float().contiguous(memory_format=dense), channels)
        torch.testing.assert_close(back.double(), x.grad[:, :channels], atol=2e-5, rtol=0)
        assert back.is_contiguous(memory_format=dense) and out.is_contiguous(memory_format=dense)


def test_doubling_is_upsampling_and_a_convolution():
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 5, 3, padding=1).requires_grad_(False)
    x = torch.randn(2, 6, 4, 8)
    found = []
    for ours in (False, True):
        own = x.clone().requires_grad_()
        if ours:
            out = frozen.Doubling.apply(own, frozen.doubling_weight(layer.weight), layer.bias)
        else:
            out = layer(F.interpolate(own, scale_factor=2.0, mode="nearest"))
        out.pow(2).sum().backward()
        found.append((out.detach(), own.grad))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("guidance", [pytest.param(1.0, marks=pytest.mark.slow), 5.0])
def test_replay_of_the_embedded_model_in_other_batches(guidance):
    """Rounding depends on the batch, with Winograd too; a log-ratio must not show it."""
    policy = build_policy(load_config(None, [f"sampling.guidance_scale={guidance}", "sampling.steps=4"]))
    assert policy.fast is not None
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        spec, prompts, count = PromptNoise(0.05), policy.encode(["a cat", "a dog"]), 6
        drawn = rollout(policy, prompts, [(0, 0, 0), (0, 0, 1)], count, 12, spec)
        paths, old, eps = (t.flatten(0, 1) for t in (drawn.latents, drawn.log_probs, drawn.prompt_noise))
        steps = policy.scored.nonzero()[:, 0]
        sample, step = torch.arange(2 * count).repeat_interleave(len(steps)), steps.repeat(2 * count)
        for size in (1, 5, 36):
            for a, t in zip(sample.split(size), step.split(size), strict=True):
                move = score_step(policy, paths[a, t], t, prompts.rows(a // count), eps[a], spec)
                ratio = gaussian.log_prob(paths[a, t + 1], move.mean, move.std) - old[a, t]
                assert ratio.abs().max() <= 1e-6
