"""What others get of a run: weights that load, a card that is true, and nothing of this machine."""

from __future__ import annotations

import functools
import re

import families
import pytest
import torch
import yaml
from safetensors.torch import load_file

import driftrl
from driftrl import Trainer
from driftrl.checks import InputError
from driftrl.evaluation.card import _bare, _measured, export
from driftrl.evaluation.evaluate import load_evaluation


def trained(config, folder, **changes):
    return Trainer(config(iterations=1, optimizer__learning_rate=0.05, **changes), folder).run()


def run_card(folder, names=()):
    """Run the Python of a card as a reader would, with the folder in the place of its name."""
    text = (folder / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("FOLDER_OR_REPOSITORY", str(folder))
    for old, new in names:
        assert old in code
        code = code.replace(old, new)
    found = {}
    exec(compile(code, "card", "exec"), found)
    return found["pipe"], text


@pytest.mark.filterwarnings("ignore")  # what diffusers says of its own loading
def test_a_card_says_what_was_measured_and_its_python_draws(config, tmp_path, pipeline_folder):
    (tmp_path / "two.txt").write_text("a cat\na dog\n")
    run = trained(config, tmp_path / "run", evaluation__prompts=str(tmp_path / "two.txt"))
    driftrl.evaluate(run, images=3)
    out = export(run, tmp_path / "out", comfyui=True)
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md", "comfyui.safetensors", "comparison.png", "pytorch_lora_weights.safetensors",
    ]  # fmt: skip
    half = ("torch_dtype=torch.float16", "torch_dtype=torch.float32")
    pipe, text = run_card(out, [(f'"{pipeline_folder.name}"', f'"{pipeline_folder}"'), half])
    ours = load_file(run / "checkpoints/000001/pytorch_lora_weights.safetensors")
    theirs = {k: v for k, v in pipe.unet.named_parameters() if "lora" in k}
    assert len(theirs) == len(ours) and sum(float(v.abs().sum()) for v in theirs.values()) > 0
    assert yaml.safe_load(text.split("---")[1])["tags"][0] == "lora"
    evaluation = load_evaluation(run)
    reward = evaluation.tuned[-1].figures["reward"]
    row = next(line for line in text.splitlines() if line.startswith("| reward"))
    for value in (evaluation.base.figures["reward"].mean, reward.mean, reward.change.mean):
        assert f"{value:.3f}".replace("-", "\N{MINUS SIGN}").replace("\N{MINUS SIGN}0.000", "0.000") in row
    assert "On 2 prompts, too few to tell much of any other: no interval is given." in text
    assert "interval)" not in text and " to " not in row
    more = evaluation.settings.model_copy(update={"prompts": ["a cat"] * 5})
    told = _measured(evaluation.model_copy(update={"settings": more}), evaluation.tuned[-1])
    low = f"{reward.change.low:+.3f}".replace("-", "\N{MINUS SIGN}").replace("\N{MINUS SIGN}0.000", "0.000")
    assert "change (95% interval)" in told and f"({low.replace('+0.000', '0.000')} to " in told
    assert "3 images of each of 2 prompts" in text and "optimizer.learning_rate: 0.05" in text
    assert str(tmp_path) not in text and str(pipeline_folder.parent) not in text


def test_without_an_evaluation_the_card_says_so(config, tmp_path, pipeline_folder):
    """Of a model of the hub, which is not asked for what is not in the cache."""
    run = trained(config, tmp_path / "run")
    file = run / "config.yaml"
    file.write_text(file.read_text().replace(str(pipeline_folder), "owner/model"))
    out = export(run / "checkpoints/000000", tmp_path / "out")
    text = (out / "README.md").read_text()
    assert (
        "Not measured" in text
        and 'from_pretrained("owner/model"' in text
        and "0 iterations" in text
        and "comparison.png" not in text
    )
    assert not (out / "comfyui.safetensors").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_whole_network_is_loaded_by_its_class(config, tmp_path, epsilon_folder, family):
    folder = epsilon_folder if family == "sd" else families.make_flux(tmp_path / "flux")
    size = dict.fromkeys(("sampling__height", "sampling__width"), 16)
    run = trained(config, tmp_path / "run", adapter__kind="full", model__path=str(folder), **size)
    out = export(run, tmp_path / "out")
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md", "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    small = ("guidance_scale", "height=16, width=16, guidance_scale")
    half = (f"torch_dtype=torch.{'float16' if family == 'sd' else 'bfloat16'}", "torch_dtype=torch.float32")
    pipe, text = run_card(out, [(f'"{folder.name}"', f'"{folder}"'), half, small])
    assert ("eta=" in text) == (family == "sd")
    network = pipe.unet if family == "sd" else pipe.transformer
    loaded = load_file(run / "checkpoints/000001/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, loaded[name]) for name, value in network.state_dict().items())
    with pytest.raises(InputError, match="--comfyui: expected a LoRA"):
        export(run, tmp_path / "more", comfyui=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "empty"), [("qwen", " "), ("schnell", "")])
def test_guidance_has_the_name_that_the_pipeline_gives_it(config, tmp_path, family, empty):
    """Qwen-Image's and FLUX.1-schnell's own ``guidance_scale`` would be ignored."""
    makers = {"qwen": families.make_qwen, "schnell": functools.partial(families.make_flux, guidance=False)}
    folder = makers[family](tmp_path / family)
    size = dict.fromkeys(("sampling__height", "sampling__width"), 16)
    out = export(trained(config, tmp_path / "run", model__path=str(folder), **size), tmp_path / "out")
    small = ("true_cfg_scale=2.0", "height=16, width=16, true_cfg_scale=2.0")
    half = ("torch_dtype=torch.bfloat16", "torch_dtype=torch.float32")
    _, text = run_card(out, [(f'"{folder.name}"', f'"{folder}"'), half, small])
    assert f'negative_prompt="{empty}"' in text and "guidance_scale" not in text.split("```")[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["flux2", "klein"])
def test_a_card_of_flux_2_draws(config, tmp_path, family):
    """Its pipelines take an image first, and klein's the embeddings of a negative prompt."""
    folder = getattr(families, f"make_{family}")(tmp_path / family)
    size = dict.fromkeys(("sampling__height", "sampling__width"), 16)
    negative = {"sampling__negative_prompt": "blurry"} if family == "klein" else {}
    run = trained(
        config, tmp_path / "run", model__path=str(folder), prompts__set="animals8", **size, **negative
    )
    out = export(run, tmp_path / "out")
    small = ("guidance_scale", "height=16, width=16, guidance_scale")
    half = ("torch_dtype=torch.bfloat16", "torch_dtype=torch.float32")
    _, text = run_card(out, [(f'"{folder.name}"', f'"{folder}"'), half, small])
    assert ("negative_prompt_embeds=" in text) == (family == "klein")


def test_a_card_has_the_negative_prompt(config, tmp_path):
    run = trained(config, tmp_path / "run", sampling__negative_prompt='a "blurry" dog')
    text = (export(run, tmp_path / "out") / "README.md").read_text()
    assert r'negative_prompt="a \"blurry\" dog"' in text


def test_what_cannot_be_exported_is_refused(config, tmp_path):
    run = trained(config, tmp_path / "run")
    for source, out, message in (
        (tmp_path / "nowhere", tmp_path / "out", "expected a run folder"),
        (run, run, "which is taken"),
    ):
        with pytest.raises(InputError, match=message):
            export(source, out)
    (run / "checkpoints/000001/pytorch_lora_weights.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError):
        export(run / "checkpoints/000001", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_lose_the_folders_of_this_machine_and_nothing_else():
    told = _bare(
        ["/home/me/sd15", "pickscore@/home/me/ps", "models/sub/x", "owner/name", "http://a:1/b/c", "~/x/y"]
    )
    assert told == ["sd15", "pickscore@ps", "models/sub/x", "owner/name", "http://a:1/b/c", "y"]
