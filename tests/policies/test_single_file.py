"""Models that are one file: the pictures of the folder that it was made from, whole runs, and what is refused."""

import json
import re
import shutil

import families
import pytest
import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS
from huggingface_hub import constants
from original import write_original
from safetensors.torch import load_file, save_file

from conftest import driftrl, run_command
from driftrl import Trainer, hub, single_file
from driftrl.build import _demand_reachable
from driftrl.checks import InputError
from driftrl.config import ModelConfig, dump_config, load_config
from driftrl.evaluation.card import export
from driftrl.evaluation.evaluate import load_evaluation
from driftrl.evaluation.generate import generate, open_policy
from driftrl.files import write_json
from driftrl.hub import of_hub
from driftrl.pipelines import load_pipeline, usual_sampling

PROMPTS = ["a cat", "a dog"]
BIG_G = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
"""A weight that of all models XL has."""


def without_weights(folder, place):
    """What `hf download` of the small files would leave of a pipeline's folder."""
    return shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.fixture(scope="session")
def made(tmp_path_factory, epsilon_folder):
    """Of each kind: the pipeline's folder, it without weights, and its weights in one file."""
    root = tmp_path_factory.mktemp("files")
    folders = {
        "sd": epsilon_folder, "sd2": families.make_sd2(root / "sd2"), "sdxl": families.make_sdxl(root / "sdxl", 32),
    }  # fmt: skip
    return {
        kind: (
            folder,
            without_weights(folder, root / f"{kind}-config"),
            write_original(load_pipeline(ModelConfig(path=str(folder))), root / f"{kind}.safetensors"),
        )
        for kind, folder in folders.items()
    }


@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl"])
def test_a_file_draws_what_its_folder_draws(made, kind):
    """Bit by bit; the configuration's folder has no weights, so all are the file's."""
    folder, config, file = made[kind]
    first, _ = open_policy(folder, 4, 2.0)
    second, _ = open_policy(file, 4, 2.0, model_config=str(config))
    assert torch.equal(generate(first, PROMPTS, 2), generate(second, PROMPTS, 2))


@pytest.fixture(scope="module")
def run(made, config, tmp_path_factory):
    """Trained on a file by the command line."""
    _, folder, file = made["sd"]
    root = tmp_path_factory.mktemp("run")
    (root / "two.txt").write_text("a cat\na dog\n")
    evaluation = {"evaluation__prompts": str(root / "two.txt"), "evaluation__images": 2}
    settings = config(iterations=1, model__path=str(file), model__config=str(folder), **evaluation)
    (root / "config.yaml").write_text(dump_config(settings))
    status, told = run_command("train", root / "config.yaml", "--out", root / "run")
    assert status == 0, told
    return root / "run"


def test_training_on_a_file_is_training_on_its_folder(run, made, config, tmp_path):
    """Bit by bit, also where a run goes on; with another configuration it does not."""
    again = shutil.copytree(run, tmp_path / "run")
    status, told = run_command("train", "--resume", again, "--set", "iterations=2")
    assert status == 0, told
    same = Trainer(config(iterations=2, model__path=str(made["sd"][0])), tmp_path / "same").run()
    ours, theirs = (
        load_file(each / "checkpoints/000002/pytorch_lora_weights.safetensors") for each in (again, same)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(v, theirs[name]) for name, v in ours.items())
    status, told = run_command("train", "--resume", again, "--set", f"model.config={made['sd2'][1]}")
    assert status == 2 and "model.config: " in told


def test_a_run_finds_its_file_again(run, made, tmp_path):
    _, folder, file = made["sd"]
    for command in (
        ("evaluate", run, "-q"),
        ("sample", run, "-p", "a cat", "-n", 1, "--base", "--out", tmp_path / "cat.png"),
        ("estimate", run / "config.yaml", "--no-probe"),
    ):
        status, told = run_command(*command)
        assert status == 0, told
    assert (tmp_path / "cat.png").is_file() and load_evaluation(run).settings.config == str(folder)
    card = (export(run, tmp_path / "out") / "README.md").read_text()
    load = f'StableDiffusionPipeline.from_single_file("{file.name}", config="{folder.name}", torch_dtype=torch.float16)'
    assert f"pipe = {load}\n" in card and str(folder.parent) not in card and "base_model" not in card


def card_of(config, tmp_path, path, folder):
    run = Trainer(
        config(iterations=0, model__path=str(path), model__config=folder and str(folder)), tmp_path / "run"
    ).run()
    text = (export(run, tmp_path / "out") / "README.md").read_text()
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace(
        "FOLDER_OR_REPOSITORY", str(tmp_path / "out")
    )


def lessened(file, place, lost):
    """The file without the weights whose names begin so."""
    save_file({name: value for name, value in load_file(file).items() if not name.startswith(lost)}, place)
    return place


@pytest.mark.filterwarnings("ignore")  # what diffusers says of its own loading
@pytest.mark.parametrize("lost", [(), ("first_stage_model.",), ("first_stage_model.", "cond_stage_model.")])
def test_what_a_file_lacks_is_of_the_folder(made, config, tmp_path, lost):
    """As of one without autoencoder, or the network alone; the card says how each is loaded, and its Python does it."""
    folder, small, file = made["sd"]
    path = lessened(file, tmp_path / "less.safetensors", lost) if lost else file
    first = load_pipeline(ModelConfig(path=str(folder)))
    second = load_pipeline(ModelConfig(path=str(path), config=str(folder)))
    code = card_of(config, tmp_path, path, folder)
    for name in (path, folder):
        assert f'"{name.name}"' in code
        code = code.replace(f'"{name.name}"', f'"{name}"')
    found = {}
    exec(code.replace("float16", "float32"), found)
    for part in ("unet", "vae", "text_encoder"):
        want = getattr(first, part).state_dict()
        assert all(torch.equal(value, want[k]) for k, value in getattr(second, part).state_dict().items())
        got = {k.replace(".base_layer", ""): v for k, v in getattr(found["pipe"], part).state_dict().items()}
        assert all(torch.equal(value, got[name]) for name, value in want.items())
    if lost:
        with pytest.raises(
            InputError, match=r"has no .*vae, and the folder .* has no weights of them either"
        ):
            load_pipeline(ModelConfig(path=str(path), config=str(small)))


def test_sampling_and_evaluating_a_file(made, tmp_path):
    _, folder, file = made["sd"]
    asked = ("--model-config", folder, "--prompts", tmp_path / "two.txt", "--steps", 3, "--guidance-scale", 1)
    (tmp_path / "two.txt").write_text("a cat\na dog\n")
    drawn = driftrl("sample", file, *asked, "-n", 1, "--out", tmp_path / "cats.png")
    assert drawn.returncode == 0 and (tmp_path / "cats.png").is_file(), drawn.stderr
    assert "torchvision" not in drawn.stderr and "float32" not in drawn.stderr
    measured = driftrl("evaluate", file, *asked, "--images", 2, "--encoder", "policy:latents",
                       "--reward", "compressibility", "-q", cwd=tmp_path)  # fmt: skip
    assert measured.returncode == 0, measured.stderr
    assert load_evaluation(tmp_path / f"runs/evaluate-{file.stem}").settings.config == str(folder)
    told = driftrl("sample", file, "-p", "a cat", "--out", tmp_path / "none.png").stderr
    assert told.startswith("driftrl: RUN_OR_MODEL: ") and "--model-config FOLDER" in told
    wrong = driftrl(
        "sample", file, "-p", "a cat", "--model-config", tmp_path / "nowhere", "--out", tmp_path / "none.png"
    )
    assert wrong.returncode == 2 and wrong.stderr.startswith(
        "driftrl: --model-config: expected a pipeline folder"
    )


def written(place, **shapes):
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, place)
    return place


FLUX = {
    "double_blocks.0.img_attn.norm.key_norm.scale": 1,
    "guidance_in.in_layer.bias": 1,
    "img_in.weight": (8, 64),
}


@pytest.mark.parametrize(
    ("shapes", "base"),
    [
        ({"model.diffusion_model.out.0.weight": 1}, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ({"model.diffusion_model.out.0.weight": 1, BIG_G: 1}, "stabilityai/stable-diffusion-xl-base-1.0"),
        (FLUX, "black-forest-labs/FLUX.1-dev"),
        ({f"model.diffusion_model.{name}": shape for name, shape in FLUX.items()}, "black-forest-labs/FLUX.1-dev"),
        ({"layers.0.adaLN_modulation.0.weight": 1}, "Tongyi-MAI/Z-Image-Turbo"),
    ],
)  # fmt: skip
def test_what_a_file_is_taken_for(tmp_path, shapes, base, monkeypatch):
    """And that it is asked for, with all else that is missing, where the hub does not answer."""
    path = str(written(tmp_path / "model.safetensors", **shapes))
    assert single_file.base_of(ModelConfig(path=path)) == base
    assert single_file.base_of(ModelConfig(path=path, config="owner/other")) == "owner/other"
    monkeypatch.setattr(hub, "answers", lambda: False)
    with pytest.raises(
        InputError, match=f"no tokenizer.*{base}|one file.*{base}.*hf download {base} --include"
    ):
        load_pipeline(ModelConfig(path=path))
    with pytest.raises(InputError, match=f"copies in its cache of {base}.*--set model.config=FOLDER"):
        _demand_reachable(load_config(overrides=[f"model.path={path}"]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: written(p, **{"lora_unet_mid_block.lora_down.weight": 1}), "is a LoRA: expected the model"),
        (lambda p: written(p, **{"unet.mid_block.to_q.lora_A.weight": 1}), "is a LoRA: expected the model"),
        (lambda p: written(p, **{"first_stage_model.encoder.conv_in.weight": 1}), r"is an autoencoder \(VAE\)"),
        (lambda p: written(p, **{"decoder.conv_in.weight": 1}), r"is an autoencoder \(VAE\)"),
        (lambda p: written(p, **{"bert.weight": 1}), "1 tensors such as bert.weight.*does not know it"),
        (written, "0 tensors such as none.*does not know it"),
        (lambda p: written(p, **{"single_stream_modulation.lin.weight": 1}), "takes it for flux-2-dev"),
        (lambda p: written(p, **FLUX, **{"img_in.weight_scale": 1}), "has quantised weights"),
        (lambda p: p.write_bytes(b"no tensors"), "no safetensors file, or a part of one"),
        (lambda p: None, "there is no such file"),
    ],
)  # fmt: skip
def test_files_that_are_no_model(tmp_path, make, message):
    make(tmp_path / "some.safetensors")
    with pytest.raises(InputError, match=message):
        load_pipeline(ModelConfig(path=str(tmp_path / "some.safetensors")))


def test_pickles_are_refused_by_name(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"")
    status, told = run_command(
        "sample", tmp_path / "model.ckpt", "-p", "a cat", "--out", tmp_path / "cat.png"
    )
    assert status == 2 and "RUN_OR_MODEL: expected a safetensors file" in told and "may run anything" in told
    assert (
        not of_hub("models/model.ckpt") and not of_hub("models/model.safetensors") and of_hub("owner/model")
    )


def test_files_and_configurations_that_do_not_fit(made, tmp_path):
    """One message that names the file and what it was completed by."""
    folder, small, file = made["sd"]

    def refused(path, config, message):
        with pytest.raises(InputError, match=message) as caught:
            load_pipeline(ModelConfig(path=str(path), config=str(config)))
        assert "\n" not in str(caught.value)

    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(file.read_bytes()[:-100])
    refused(torn, small, "no safetensors file, or a part of one")
    lost = lessened(file, tmp_path / "lost.safetensors", "model.diffusion_model.middle_block.1")
    refused(lost, small, "cannot be loaded: weights are missing; is .*sd-config what it was made from")
    wordless = lessened(
        file, tmp_path / "wordless.safetensors", "cond_stage_model.transformer.text_model.final"
    )
    refused(wordless, small, "holds .* numbers of text_encoder, a CLIPTextModel")
    refused(
        written(tmp_path / "bert.safetensors", **{"bert.weight": 1}), folder, "cannot be loaded.*made from"
    )
    refused(file, made["sdxl"][0], "cannot be loaded: there is no .*sdxl what it was made from")
    refused(made["sdxl"][2], folder, "cannot be loaded: .* expected shape .*, but got")
    refused(file, tmp_path, "model.config: .* no diffusers pipeline folder: it has no model_index.json")
    refused(file, file, "model.config: .* no diffusers pipeline folder")
    refused(folder, small, "model.config: expected none, for .* is no safetensors file")
    bare = without_weights(folder, tmp_path / "bare")
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (bare / "tokenizer" / name).unlink(missing_ok=True)
    refused(file, bare, "tokenizer")
    index = json.loads((small / "model_index.json").read_text()) | {
        "_class_name": "StableDiffusionImg2ImgPipeline"
    }
    other = without_weights(folder, tmp_path / "other")
    write_json(other / "model_index.json", index)
    refused(file, other, "model.config: .* is a StableDiffusionImg2ImgPipeline; expected one of")


@pytest.mark.parametrize("kind", ["float16", "float8_e4m3fn"])
def test_a_file_of_fewer_bits(made, tmp_path, kind):
    """Is read into the precision that is asked for; weights of few bits with scales beside them are refused above."""
    _, small, file = made["sdxl"]
    rounded = {name: value.to(getattr(torch, kind)) for name, value in load_file(file).items()}
    save_file(rounded, tmp_path / "small.safetensors")
    first, second = (
        load_pipeline(ModelConfig(path=str(path), config=str(small)))
        for path in (file, tmp_path / "small.safetensors")
    )
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        state = getattr(second, part).state_dict()
        for name, value in getattr(first, part).state_dict().items():
            want = value.to(getattr(torch, kind)).float()
            assert state[name].dtype == torch.float32 and torch.equal(state[name], want)


def test_a_file_that_says_what_it_predicts(made, tmp_path):
    """By a key that trainers put there; its scheduler must be of the same."""
    _, folder, file = made["sd2"]
    marked = tmp_path / "marked.safetensors"
    save_file(load_file(file) | {"v_pred": torch.zeros(0)}, marked)
    assert load_pipeline(ModelConfig(path=str(marked), config=str(folder))) is not None
    other = shutil.copytree(folder, tmp_path / "epsilon")
    scheduler = other / "scheduler/scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("v_prediction", "epsilon"))
    with pytest.raises(InputError, match="model of v-prediction, by its key v_pred"):
        load_pipeline(ModelConfig(path=str(marked), config=str(other)))


@pytest.mark.filterwarnings("ignore")  # what diffusers says of its own loading
@pytest.mark.parametrize("lost", [(), ("first_stage_model.", "cond_stage_model.")])
def test_what_it_was_made_from_is_of_the_hub(made, config, tmp_path, monkeypatch, lost):
    """Where nothing is named: what this machine's cache of the hub has of the usual one, without asking the hub."""
    folder, small, file = made["sd"]
    name, commit = "stable-diffusion-v1-5/stable-diffusion-v1-5", "0" * 40
    place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder if lost else small, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    path = lessened(file, tmp_path / "less.safetensors", lost) if lost else file
    pipeline, want = load_pipeline(ModelConfig(path=str(path))), load_pipeline(ModelConfig(path=str(folder)))
    for part in ("unet", "vae", "text_encoder"):
        state = getattr(pipeline, part).state_dict()
        assert all(torch.equal(value, state[k]) for k, value in getattr(want, part).state_dict().items())
    code = card_of(config, tmp_path, path, None)
    assert f'from_single_file("{path.name}"' in code and (f'from_pretrained("{name}"' in code) == bool(lost)


@pytest.mark.parametrize(("called", "usual"), [("z_turbo_tuned", (9, 0.0)), ("z_tuned", (50, 4.0))])
def test_only_its_name_tells_turbo(tmp_path, monkeypatch, called, usual):
    """Of a Z-Image, which diffusers takes for Turbo whatever it is."""
    folder = families.make_zimage(tmp_path / "made")
    weights = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    save_file(weights, tmp_path / f"{called}.safetensors")
    kind = {"pretrained_model_name_or_path": str(folder)}
    monkeypatch.setitem(DIFFUSERS_DEFAULT_PIPELINE_PATHS, "z-image-turbo", kind)
    assert usual_sampling(load_pipeline(ModelConfig(path=str(tmp_path / f"{called}.safetensors")))) == usual


def test_a_file_of_sd3_without_t5_asks_for_none(tmp_path, monkeypatch):
    """Its folder was saved without that encoder too, which diffusers wants to be told."""
    folder = tmp_path / "sd3"
    parts = {
        "text_encoder": "CLIPTextModelWithProjection", "text_encoder_2": "CLIPTextModelWithProjection", "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
    }  # fmt: skip
    for name in parts:
        (folder / name).mkdir(parents=True)
    index = {name: ["diffusers", kind] for name, kind in parts.items()}
    index |= {
        "_class_name": "StableDiffusion3Pipeline",
        "text_encoder_3": [None, None],
        "tokenizer_3": [None, None],
    }
    write_json(folder / "model_index.json", index)
    names = (
        "model.diffusion_model.a",
        "text_encoders.clip_l.a",
        "text_encoders.clip_g.a",
        "first_stage_model.a",
    )
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "sd3.safetensors")
    asked = {}

    def stopped(file, **settings):
        asked.update(settings)
        raise ValueError("enough")

    monkeypatch.setattr("diffusers.StableDiffusion3Pipeline.from_single_file", stopped)
    with pytest.raises(InputError, match="enough"):
        load_pipeline(ModelConfig(path=str(tmp_path / "sd3.safetensors"), config=str(folder)))
    assert asked.keys() - {"config", "revision", "dtype"} == {"text_encoder_3", "tokenizer_3"}
