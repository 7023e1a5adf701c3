"""Compiled blocks compute what plain ones do, and an untouched policy still has ratio 1."""

import families
import pytest
import torch

from driftrl import checkpoint
from driftrl.build import build_loop, build_policy
from driftrl.checks import InputError
from driftrl.policies.pipeline import PipelinePolicy

SIZE = {"sampling__height": 16, "sampling__width": 16, "sampling__guidance_scale": 3.0}


@pytest.fixture
def traced(monkeypatch):
    """Blocks go through torch.compile's tracing and its split into forward and backward, but no code is generated."""
    plain = PipelinePolicy.compile_blocks
    torch.compiler.reset()
    monkeypatch.setattr(PipelinePolicy, "compile_blocks", lambda self: plain(self, "aot_eager"))
    yield
    torch.compiler.reset()


def outputs(policy):
    """Of one step, and a gradient."""
    conditioning = policy.encode(["a cat", "a dog"])
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draw))
    latents = torch.randn(2, *policy.latent_shape, generator=draw)
    mean = policy.transition(latents, torch.tensor([0, 1]), conditioning).mean
    mean.square().sum().backward()
    return mean.detach(), torch.cat([p.grad.flatten() for p in policy.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd2", "sd3", "flux", "klein"])
def test_numbers_are_those_of_plain_blocks(config, traced, tmp_path, family):
    folder = str(getattr(families, f"make_{family}")(tmp_path / family))
    compiled, plain = (
        build_policy(config(model__path=folder, model__compile=on, **SIZE)) for on in (True, False)
    )
    assert compiled.compiled and compiled.fast is None and not compiled.has_sample_gradients
    for own, theirs in zip(outputs(compiled), outputs(plain), strict=True):
        torch.testing.assert_close(own, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_has_ratio_one_and_writes_the_same_adapter(config, traced, tmp_path, checkpointing):
    settings = {"model__compile": True, "model__gradient_checkpointing": checkpointing}
    loop = build_loop(config(**settings), tmp_path)
    done = loop.iterate()
    assert done.metrics["policy/ratio_deviation"] <= 1e-6
    assert done.metrics["policy/grad_norm"] > 0
    plain = build_policy(config())
    checkpoint.load(loop.save(), plain)  # names of weights have not changed
    for one, other in zip(plain.parameters(), loop.policy.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile imports
def test_code_is_generated(config, tmp_path):
    """By a C++ compiler, which has to be there; half a minute."""
    torch.compiler.reset()
    loop = build_loop(config(model__compile=True), tmp_path)
    done = loop.iterate()
    assert done.metrics["policy/ratio_deviation"] <= 1e-6 and done.metrics["policy/grad_norm"] > 0


def test_a_network_without_such_blocks_is_refused(config, monkeypatch):
    monkeypatch.setattr(PipelinePolicy, "blocks", ("NoSuchBlock",))
    with pytest.raises(InputError, match=r"model\.compile: the unet has no NoSuchBlock"):
        build_policy(config(model__compile=True))


def test_a_fused_optimizer_goes_on_from_a_checkpoint(config, tmp_path):
    """As a GPU has it; it counts its steps beside the weights."""
    ends = []
    for resumed in (False, True):
        loop = build_loop(config(), tmp_path / str(resumed))
        loop.optimizer = torch.optim.AdamW(loop.policy.parameters(), lr=1e-3, fused=True)
        loop.iterate()
        if resumed:
            path = loop.save()
            loop.optimizer = torch.optim.AdamW(loop.policy.parameters(), lr=1e-3, fused=True)
            loop.resume(path)
        loop.iterate()
        ends.append(torch.cat([p.detach().flatten() for p in loop.policy.parameters()]))
    assert torch.equal(*ends)
