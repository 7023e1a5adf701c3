"""On another device everything comes out as on the CPU, and nothing is left behind there.

`tests/test_overlap.py` runs this in a process of its own, on a device that is emulated; ``make test-gpu`` on a real one.
"""

import functools
import json
import os
from pathlib import Path

import families
import pytest
import second_device
import torch

import driftrl
from driftrl import Trainer, noise
from driftrl.build import build_loop
from driftrl.config import load_config, parse_config
from driftrl.policies import fast_linear, fast_unet
from driftrl.policies.full import FullWeights
from driftrl.rollout import rollout

TARGET = os.environ.get("DRIFTRL_TEST_DEVICE", second_device.NAME)
REAL = TARGET != second_device.NAME
CLOSE = {"rel": 1e-2, "abs": 1e-3} if REAL else {"rel": 1e-3, "abs": 1e-5}
"""The emulated one computes attention by another kernel; a real one rounds differently everywhere."""

FOLDER = Path(__file__).parents[2] / "experiments/methods"
METHODS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
MAKERS = {
    "sd2": families.make_sd2, "sdxl": families.make_sdxl, "sd3": families.make_sd3,
    "sd35": functools.partial(families.make_sd3, medium35=True), "flux": families.make_flux,
    "schnell": functools.partial(families.make_flux, guidance=False), "sana": families.make_sana, "qwen": families.make_qwen,
    "zimage": families.make_zimage, "flux2": families.make_flux2, "klein": families.make_klein,
}  # fmt: skip

MORE = pytest.mark.slow
"""Of what differs little from something that is checked anyway."""


@pytest.fixture(scope="session", autouse=True)
def _known():
    """Not when this file is imported: doctests are looked for in it."""
    held = None if REAL else second_device.register()
    yield held


@pytest.fixture(autouse=True)
def _plain_layers(monkeypatch):
    """The CPU computes as others do, without its fast layers, and a real device in full precision."""
    monkeypatch.setattr(fast_linear, "install", lambda network: None)
    monkeypatch.setattr(fast_unet, "build", lambda network: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def colour(images, prompts):
    """A reward without steps, which rounding would not take far; and the images must be where the policy is."""
    return (images * torch.linspace(0, 1, images.shape[-1], device=images.device)).mean((1, 2, 3))


pytestmark = pytest.mark.filterwarnings(
    "ignore::driftrl.trainer.RewardWarning",  # of a network that was never trained
    "ignore::driftrl.build.GuidanceWarning",
    "ignore::driftrl.build.UnlikelySettingWarning",
    "ignore::UserWarning:torch",  # of a backend in Python: what it has not registered
)


def test_the_device_is_another_one():
    """Or else the checks below prove nothing."""
    x = torch.ones(2, 3, device=TARGET)
    assert x.device.type == TARGET and (x @ x.T).tolist() == [[3.0, 3.0], [3.0, 3.0]]
    for mixed in (lambda: x + torch.ones(2, 3), lambda: torch.cat([x, torch.ones(2, 3)]), x.numpy):
        with pytest.raises((RuntimeError, TypeError)):
            mixed()
    layer = torch.nn.Linear(3, 1).to(TARGET)
    layer(x).sum().backward()
    assert layer.weight.grad.device.type == TARGET
    with torch.autocast(TARGET, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def iterations(config, folder):
    """A loop after two iterations, and what they measured."""
    loop = build_loop(config, folder)
    return loop, [loop.attempt().metrics for _ in range(2)]


HALF = ("reward/mean", "diversity/kept_mean", "policy/grad_norm")
"""What half precision leaves comparable."""


def assert_close(here, there, names=None, **closeness):
    assert here.keys() == there.keys()
    for name in names or here:
        assert here[name] == pytest.approx(there[name], **CLOSE | closeness, nan_ok=True), name


def assert_same_run(config, tmp_path):
    """Both devices measure the same, hold their own tensors, and read one another's checkpoints."""
    elsewhere, expected = iterations(config("cpu"), tmp_path / "cpu")
    loop, found = iterations(config(TARGET), tmp_path / "device")
    half = {} if loop.policy.dtype == torch.float32 else {"names": HALF, "rel": 0.3}
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, **half)
    assert {p.device.type for p in loop.policy.network.parameters()} == {TARGET}
    if isinstance(loop.policy.weights, FullWeights) and not REAL:
        return  # the libraries look at a network's storage, which a device in Python has not
    moved = loop.save()
    elsewhere.resume(moved)
    loop.resume(elsewhere.save())
    moments = [x for state in loop.optimizer.state.values() for name, x in state.items() if name != "step"]
    assert {x.device.type for x in moments} == {TARGET}
    assert_close(loop.attempt().metrics, elsewhere.attempt().metrics, **half)


def some(names, often):
    """Those that `make test` checks, and with ``-m slow`` the others."""
    return [pytest.param(name, marks=() if name in often else MORE) for name in names]


@pytest.mark.parametrize("family", some(["sd", *MAKERS], []))
def test_families(config, epsilon_folder, tmp_path, family):
    folder = MAKERS[family](tmp_path / family) if family in MAKERS else epsilon_folder
    side = 64 if family == "sana" else 16
    assert_same_run(
        lambda device: config(
            model__path=str(folder), model__device=device, sampling__height=side, sampling__width=side,
            prompts__set="animals8", sampling__steps=3, optimizer__learning_rate=1e-3, reward=colour,
        ),
        tmp_path,
    )  # fmt: skip


@pytest.mark.parametrize("name", some(METHODS, ["gardo"]))
def test_methods(pipeline_folder, encoder_folder, tmp_path, name):
    def config(device):
        settings = load_config(FOLDER / f"{name}.yaml", [
            f"model.path={pipeline_folder}", f"model.device={device}", "adapter.rank=2", "prompts.per_iteration=3",
            "sampling.steps=4", "sampling.candidates=6", "selection.keep=4", f"shaping.encoder={encoder_folder}",
            "advantage.history=9", "advantage.min_history=4", "logging.trackers=[]", "evaluation.at_end=false",
        ])  # fmt: skip
        return parse_config(settings.model_dump() | {"reward": colour})

    assert_same_run(config, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"optimizer__updates": 2, "optimizer__one_pass": False}, marks=MORE),
        pytest.param({"model__dtype": "bfloat16", "selection__keep": 6}, marks=MORE),
        pytest.param({"adapter__kind": "full", "model__dtype": "bfloat16", "selection__keep": 6}, marks=MORE),
        pytest.param({"model__gradient_checkpointing": True}, marks=MORE),
        pytest.param({"shaping__encoder": "policy:latents"}, marks=MORE),
        pytest.param({"shaping__encoder": "policy:mid-block"}, marks=MORE),
        pytest.param({"sampling__overlap_reward": True}, marks=MORE),
    ],
    ids=", ".join,
)
def test_settings(config, tmp_path, changes):
    assert_same_run(lambda device: config(model__device=device, reward=colour, **changes), tmp_path)


@pytest.mark.skipif(REAL, reason="a real device does not say what was copied")
@pytest.mark.parametrize("size", [pytest.param(18, marks=MORE), 4])
def test_only_noise_goes_to_the_device_during_a_rollout(config, tmp_path, monkeypatch, size):
    """Embeddings, times and schedules are there already; nothing comes back, so the host runs ahead."""
    loop = build_loop(config(model__device=TARGET, sampling__batch_size=size), tmp_path)
    drawn, placed = [], noise.placed
    monkeypatch.setattr(noise, "placed", lambda draws, device: drawn.append(1) or placed(draws, device))
    rows = loop.conditioning.rows(torch.tensor([0, 1, 2], device=TARGET))
    second_device.CROSSINGS.clear()
    rollout(
        loop.policy,
        rows,
        [(0, 0, prompt) for prompt in range(3)],
        6,
        loop.rollout_batch,
        loop.method.prompt_noise,
    )
    assert len(second_device.CROSSINGS) == len(drawn)
    assert len(drawn) == (4 + 2) * -(-18 // size)


@MORE
def test_the_optimiser_of_a_gpu(config, tmp_path, monkeypatch):
    """Fused, it counts its steps on the device."""
    monkeypatch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, fused=True))
    assert_same_run(lambda device: config(model__device=device, reward=colour), tmp_path)


def test_evaluation(config, tmp_path):
    """With the embedded reward, CLIP and encoder."""
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na dog\n")
    own = {"reward": "tiny-animals", "shaping__encoder": "tiny-animals", "prompts__set": str(file)}
    means = {}
    for device in ("cpu", TARGET):
        run = Trainer(config(model__device=device, prompts__per_iteration=2, **own), tmp_path / device).run()
        file = driftrl.evaluate(run, images=3) / "evaluation.json"
        points = json.loads(file.read_text())["points"]
        means[device] = [{k: v["mean"] for k, v in point["figures"].items()} for point in points]
    assert means["cpu"]
    for here, there in zip(means[TARGET], means["cpu"], strict=True):
        assert_close(here, there)
