"""Evaluation on the random tiny pipeline: what is measured, that it is not measured twice, what is refused."""

from __future__ import annotations

import inspect
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from conftest import driftrl, run_command
from driftrl import Trainer
from driftrl.batches import BatchSize, MemoryWarning
from driftrl.checks import InputError, RunFailedError
from driftrl.cli.evaluate import Lines, _progress
from driftrl.config import dump_config, load_config
from driftrl.evaluation.evaluate import FILE, Asked, evaluate, in_words, load_evaluation
from driftrl.evaluation.generate import generate, open_policy
from driftrl.evaluation.measures import unsuited
from driftrl.evaluation.studio import Instruments, Readings, _asked, measure
from driftrl.pipelines import load_pipeline


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "three.txt"
    file.write_text("a cat\na dog\n<b>a</b> fox\n")
    return str(file)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A CLIP model with random weights."""
    from transformers import CLIPConfig, CLIPModel

    from conftest import save_tokenizer, text_settings

    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("models") / "clip"
    text = text_settings(save_tokenizer(folder))
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "projection_dim": 16,
    }
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def trained(config, tmp_path_factory):
    from driftrl import Trainer

    folder = tmp_path_factory.mktemp("trained") / "run"
    return Trainer(config(optimizer__learning_rate=0.02), folder).run()


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def settings(prompts_file, clip_folder, **changes):
    return {"prompts": prompts_file, "images": 4, "clip": clip_folder} | changes


def test_a_reward_that_fails_or_writes_into_the_images_ends_it_with_one_message():
    for reward, error, told in (
        (
            lambda images, prompts: {}[prompts[0]],
            RunFailedError,
            r"mine failed: KeyError: 'a cat' \(.*test_evaluate",
        ),
        (lambda images, prompts: None, InputError, "mine: expected a tensor of 1 numbers"),
        (lambda images, prompts: images.mul_(0).mean((1, 2, 3)), InputError, "changed the images"),
    ):
        with pytest.raises(error, match=told):
            _asked("mine", reward, torch.ones(1, 3, 2, 2), ["a cat"])


def test_what_is_drawn_is_told_in_words():
    assert [in_words(label) for label in ("base", "000020", "000020x0.5")] == [
        "base model", "iteration 20", "iteration 20, scale 0.5",
    ]  # fmt: skip
    assert in_words("reference") == "base model, second draw (for recall)"


def test_a_narrow_terminal_cuts_no_figure_short():
    console = Console(force_terminal=True, width=80, color_system=None, file=io.StringIO())
    with _progress(console, False) as progress:
        progress.add_task(in_words("reference"), total=25600, completed=320)
    shown = console.file.getvalue()
    assert in_words("reference") in shown and "320/25600 images, left -:--:--" in shown


def test_a_long_evaluation_says_every_half_minute_how_long_it_takes_yet():
    lines = Lines(30.0)
    times = (100.0, 120.0, 131.0, 150.0, 162.0, 163.0)
    told = [lines.due("base model", 4 + 4 * k, 24, now) for k, now in enumerate(times)]
    assert told == [
        "evaluating base model  4/24 images", "", "evaluating base model  12/24 images  46.5 s left", "",
        "evaluating base model  20/24 images  15.5 s left", "evaluating base model  24/24 images",
    ]  # fmt: skip


def test_the_embedded_clip_model_is_for_the_embedded_model(run, prompts_file, clip_folder):
    """Of others it is asked where somebody names it, and that is said."""
    chosen = settings(prompts_file, None)
    told = driftrl("evaluate", run, "--prompts", prompts_file, "--images", 4).stderr
    assert "CLIP diversity and prompt-image similarity are left out" in told
    plain = load_evaluation(run)
    assert plain.settings.clip is None and not {"diversity/clip", "similarity"} & set(plain.base.figures)
    own = load_config(run / "config.yaml")
    own = own.model_copy(update={"evaluation": own.evaluation.model_copy(update={"clip": str(clip_folder)})})
    (run / "config.yaml").write_text(dump_config(own))
    asked = load_evaluation(evaluate(run, **chosen))
    assert asked.settings.clip == str(clip_folder) and {"diversity/clip", "similarity"} <= set(
        asked.base.figures
    )
    toy = load_evaluation(evaluate(run, **(chosen | {"clip": "tiny-animals"})))
    assert "CLIP diversity is by the embedded model's own" in " ".join(unsuited(toy.settings))
    assert unsuited(toy.settings.model_copy(update={"model": "tiny-animals"})) == []


def test_what_type_checkers_are_told_is_what_can_be_asked():
    assert Asked.__annotations__.keys() == inspect.signature(evaluate).parameters.keys() - {
        "source",
        "progress",
    }


def test_a_negative_prompt_is_part_of_what_figures_depend_on(run, prompts_file, clip_folder):
    chosen = settings(prompts_file, clip_folder)
    plain = load_evaluation(evaluate(run, **chosen))
    asked = load_evaluation(evaluate(run, **chosen, negative_prompt="a blurry dog"))
    assert (plain.settings.negative_prompt, asked.settings.negative_prompt) == ("", "a blurry dog")
    assert plain.settings.fingerprint() != asked.settings.fingerprint()
    assert plain.base.figures["diversity"].per_prompt != asked.base.figures["diversity"].per_prompt
    assert load_evaluation(evaluate(run, **chosen)).settings == plain.settings


@pytest.mark.filterwarnings("error")
def test_without_noise_on_the_way(config, run, prompts_file, clip_folder, tmp_path):
    """By option or by the run's setting, and then the images are those of `driftrl sample --deterministic`."""
    chosen = settings(prompts_file, clip_folder)
    noisy = load_evaluation(evaluate(run, **chosen))
    still = load_evaluation(evaluate(run, **chosen, deterministic=True, keep_images=True))
    assert (noisy.settings.eta, still.settings.eta) == (1.0, 0.0)
    assert (noisy.settings.still, still.settings.still) == (False, True)
    for point in (still.base, still.tuned[0]):
        assert point.figures["diversity"].per_prompt != noisy.base.figures["diversity"].per_prompt
    policy, _ = open_policy(run, deterministic=True)
    drawn = generate(policy, still.settings.prompts, 4)
    (folder,) = (run / "images").glob("evaluation*/000002/000-*")
    with Image.open(folder / "003.png") as picture:
        written = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    torch.testing.assert_close(written, drawn[0, 3], atol=0.5 / 255 + 1e-6, rtol=0)
    asked = config(evaluation__deterministic=True, evaluation__steps=still.settings.steps + 1)
    (run / "config.yaml").write_text(dump_config(asked))
    again = evaluate(run, **chosen, out=tmp_path / "asked")
    assert load_evaluation(again).settings.eta == 0.0
    assert load_evaluation(again).settings.steps == still.settings.steps + 1
    typed = load_evaluation(evaluate(run, **chosen, steps=still.settings.steps, out=tmp_path / "fewer"))
    assert typed.base.figures == still.base.figures
    status, told = run_command("evaluate", run, "--deterministic", "--images", "4", "--prompts", prompts_file,
                               "--clip", clip_folder, "--out", tmp_path / "typed", "-q")  # fmt: skip
    assert status == 0, told
    assert load_evaluation(tmp_path / "typed").settings.eta == 0.0


def test_instruments_run_out_of_memory_and_read_fewer_images_at_once(run, prompts_file, clip_folder):
    """As in training: what was drawn is not lost."""
    counts = []

    def hungry(images, prompts):
        counts.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return images.mean((1, 2, 3))

    def hungry_encoder(images):
        return hungry(images, None)[:, None] + images.flatten(1)[:, :5]

    images, prompts = torch.rand(3, 4, 3, 8, 8), ["a", "b", "c"]
    with pytest.warns(MemoryWarning, match="it is 3 from here on"):
        read = Instruments({"reward": hungry}, hungry_encoder, None).read(
            images, prompts, BatchSize(12, "images")
        )
    torch.testing.assert_close(read.rewards["reward"], images.mean((2, 3, 4)).double())
    torch.testing.assert_close(read.features[..., 0], (images.mean((2, 3, 4)) + images[:, :, 0, 0, 0]))
    assert counts[:3] == [12, 6, 3] and max(counts[3:]) == 3
    with pytest.raises(RunFailedError, match="out of memory, though images is down to 1"):
        Instruments(
            {"reward": lambda images, prompts: hungry(torch.zeros(9), None)}, hungry_encoder, None
        ).read(images, prompts, BatchSize(2, "images"))


def test_measures_base_and_every_checkpoint_once(run, prompts_file, clip_folder, monkeypatch):
    told = []
    chosen = settings(prompts_file, clip_folder, checkpoints="all", rewards=["compressibility"])
    evaluate(run, **chosen, progress=lambda label, done, total: told.append((label, done, total)))
    evaluation = load_evaluation(run)
    assert [point.label for point in evaluation.points] == ["base", "000001", "000002"]
    names = {
        "reward",
        "reward/compressibility",
        "similarity",
        "diversity",
        "diversity/clip",
        "diversity/latents",
        "vendi",
        "vendi/2",
    }
    assert set(evaluation.base.figures) == names | {"recall", "precision", "density", "coverage"}
    for point in evaluation.tuned:
        for name, figure in point.figures.items():
            before = evaluation.base.figures[name]
            assert figure.mean == pytest.approx(sum(figure.per_prompt) / 3)
            assert figure.low <= figure.mean + 1e-12 and figure.mean <= figure.high + 1e-12
            assert figure.change.mean == pytest.approx(figure.mean - before.mean)
    rewards = evaluation.base.figures
    assert rewards["reward"].mean == pytest.approx(-rewards["reward/compressibility"].mean)
    assert told[-1][1] == told[-1][2] == 4 * 3 * 4  # three models and the reference draw

    told.clear()
    before = (run / FILE).read_text()
    options = ["--prompts", prompts_file, "--images", 4, "--clip", clip_folder, "--reward", "compressibility"]
    for asked, shown in (("1", "iteration 1"), ("all", "iteration 2")):
        status, table = run_command("evaluate", run, *options, "--checkpoint", asked)
        assert status == 0 and shown in table, table
    status, table = run_command("evaluate", run / "checkpoints/000001", *options)
    assert status == 0 and "iteration 1" in table, table
    monkeypatch.setattr("driftrl.cli.evaluate.EVERY", 0.0)
    waited = driftrl("evaluate", run, *options, "--seed", 1, "--checkpoint", 1).stderr
    assert "evaluating base model, second draw (for recall)  12/36 images\n" in waited
    assert re.search(r"evaluating base model  24/36 images  [0-9.]+ (ms|s|min) left\n", waited)
    assert "evaluating iteration 1  36/36 images\n" in waited
    shown = driftrl("evaluate", run, *options)
    assert "iteration 2" in shown.stdout and "report.html" not in shown.stdout  # figures alone
    assert f"open {run / 'report.html'}" in shown.stderr and "iteration 2" not in shown.stderr
    assert "On 3 prompts, too few to tell much of any other: no interval is given.\n" in shown.stdout
    assert shown.stdout.startswith("drift, 3 prompts x 4 images, mean over prompts\n")  # in one line
    assert "interval)" not in shown.stdout and " to " not in shown.stdout.partition("On 3")[0]
    written = json.loads(driftrl("evaluate", run, *options, "--json", "--quiet").stdout)
    assert [point["label"] for point in written["points"]] == ["base", "000001", "000002"]
    for point, measured in zip(written["points"], evaluation.points, strict=True):
        assert {k: v["mean"] for k, v in point["figures"].items()} == {
            k: v.mean for k, v in measured.figures.items()
        }
    change = evaluation.tuned[-1].figures["reward"].change
    assert written["points"][-1]["figures"]["reward"]["change"] == {"mean": change.mean, "interval": None}
    evaluate(run, **chosen, progress=lambda *_: told.append(1))
    assert not told and (run / FILE).read_text() == before


def test_goes_on_where_it_stopped_and_puts_other_settings_aside(run, prompts_file, clip_folder):
    chosen = settings(prompts_file, clip_folder)
    labels: list[str] = []
    evaluate(run, **chosen)
    first = load_evaluation(run)
    evaluate(run, **chosen, checkpoints="2,1", progress=lambda label, *_: labels.append(label))
    assert set(labels) == {"reference", "000001"}
    both = load_evaluation(run)
    assert [p.label for p in both.points] == ["base", "000001", "000002"]
    assert both.points[2] == first.points[1]

    evaluate(run, **(chosen | {"images": 3}))
    assert load_evaluation(run).settings.images == 3
    labels.clear()
    evaluate(run, **chosen, checkpoints="all", progress=lambda label, *_: labels.append(label))
    assert not labels and load_evaluation(run) == both


def test_goes_on_beside_a_base_model_that_an_older_version_measured(run, prompts_file, clip_folder):
    """What it did not measure yet is left out of the new checkpoints too, so that the file stays whole."""
    chosen = settings(prompts_file, clip_folder)
    evaluate(run, **chosen)
    data = json.loads((run / FILE).read_text())
    for point in data["points"]:
        del point["figures"]["diversity/latents"]
    (run / FILE).write_text(json.dumps(data))
    evaluate(run, **chosen, checkpoints="1,2")
    evaluation = load_evaluation(run)
    assert [p.label for p in evaluation.points] == ["base", "000001", "000002"]
    assert "diversity/latents" not in evaluation.points[1].figures


def test_latent_diversity_is_by_the_autoencoder_that_nothing_trains(run, prompts_file, clip_folder):
    evaluate(run, **settings(prompts_file, clip_folder))
    texts = Path(prompts_file).read_text().split("\n")[:1]
    policy, noise = open_policy(run)
    images = generate(policy, texts, 4, prompt_noise=noise)[0]
    vae = load_pipeline(load_config(run / "config.yaml").model).vae
    with torch.no_grad():
        z = vae.encode(images * 2 - 1).latent_dist.mean.flatten(1).double()  # 8 x 8 places already
    z = z / z.norm(dim=1, keepdim=True)
    expected = (1 - z @ z.T).sum() / 12
    assert load_evaluation(run).tuned[-1].figures["diversity/latents"].per_prompt[0] == pytest.approx(
        float(expected), abs=1e-4
    )


def test_a_checkpoint_trained_anew_is_measured_anew(run, prompts_file, clip_folder):
    chosen, labels = settings(prompts_file, clip_folder), []
    evaluate(run, **chosen)
    shutil.rmtree(run / "checkpoints" / "000002")
    shutil.copytree(run / "checkpoints" / "000001", run / "checkpoints" / "000002")
    evaluate(run, **chosen, progress=lambda label, *_: labels.append(label))
    assert "000002" in labels and "base" not in labels


def test_base_figures_are_those_of_the_model_alone_whatever_the_batch(
    run, pipeline_folder, prompts_file, clip_folder, tmp_path
):
    evaluate(run, **settings(prompts_file, clip_folder))
    evaluate(run, **settings(prompts_file, clip_folder), out=tmp_path / "again", batch_size=3)
    a, b = load_evaluation(run), load_evaluation(tmp_path / "again")
    for name, figure in a.tuned[0].figures.items():
        assert b.tuned[0].figures[name].per_prompt == pytest.approx(figure.per_prompt, abs=1e-3)


def test_the_untrained_checkpoint_is_the_base_model(config, prompts_file, clip_folder, tmp_path):
    from driftrl import Trainer

    run = Trainer(config(iterations=0), tmp_path / "run").run()
    evaluate(run, **settings(prompts_file, clip_folder))
    for figure in load_evaluation(run).tuned[0].figures.values():
        assert figure.change.mean == pytest.approx(0.0, abs=1e-9)


def test_a_model_alone(pipeline_folder, encoder_folder, prompts_file, clip_folder, tmp_path, monkeypatch):
    from driftrl.evaluation import evaluate as module

    monkeypatch.setattr(
        module, "build_reward", lambda name, device, **_: lambda images, prompts: images.mean((1, 2, 3))
    )
    asked = {
        **settings(prompts_file, clip_folder), "encoder": str(encoder_folder), "steps": 3, "out": tmp_path / "out",
    }  # fmt: skip
    before = load_evaluation(evaluate(pipeline_folder, **asked))
    folder = evaluate(pipeline_folder, **asked, keep_images=True)  # measured already, but without
    evaluation = load_evaluation(folder)
    assert evaluation.points == before.points
    assert not evaluation.tuned and evaluation.settings.steps == 3
    assert len(list((folder / "images").rglob("*.png"))) == 12
    with pytest.raises(InputError, match="no run folder"):
        evaluate(pipeline_folder, **settings(prompts_file, clip_folder), checkpoints="3")


def test_order_of_images_does_not_matter():
    torch.manual_seed(0)
    features, reference = torch.randn(2, 8, 5), torch.randn(2, 8, 5)
    order = torch.randperm(8)
    a = measure(Readings({"reward": torch.ones(2, 8)}, features, features), reference)
    b = measure(Readings({"reward": torch.ones(2, 8)}, features[:, order], features[:, order]), reference)
    for name in a:
        assert a[name] == pytest.approx(b[name], abs=1e-9)


def test_a_collapsed_model_is_seen():
    torch.manual_seed(0)
    reference = torch.randn(1, 16, 8)
    spread = Readings({}, torch.randn(1, 16, 8), None)
    collapsed = Readings({}, reference[:, :1] + 1e-3 * torch.randn(1, 16, 8), None)
    wide, narrow = measure(spread, reference), measure(collapsed, reference)
    assert narrow["recall"][0] < 0.1 < wide["recall"][0]
    assert narrow["diversity"][0] < 1e-3 < wide["diversity"][0]
    assert narrow["vendi"][0] < 1.1 < wide["vendi"][0]


def test_refuses_features_and_rewards_that_are_no_numbers():
    images = torch.rand(1, 2, 3, 4, 4)

    def good(x):
        return x.flatten(1)

    with pytest.raises(InputError, match=r"encoder's features: .* not finite"):
        Instruments({}, lambda x: good(x) * float("nan"), None).read(images, ["a"])
    with pytest.raises(InputError, match="reward: 1 of 2 values are not finite"):
        Instruments({"reward": lambda x, p: torch.tensor([0.0, float("inf")])}, good, None).read(
            images, ["a"]
        )
    with pytest.raises(InputError, match="expected a tensor of 2 numbers"):
        Instruments({"reward": lambda x, p: torch.zeros(3)}, good, None).read(images, ["a"])
    with pytest.raises(InputError, match="at least 2"):
        measure(Readings({}, torch.randn(1, 1, 4), None), torch.randn(1, 1, 4))


def test_refuses_what_cannot_be_measured(run, prompts_file, clip_folder, tmp_path):
    chosen = settings(prompts_file, clip_folder)
    with pytest.raises(InputError, match="at least 2"):
        evaluate(run, **(chosen | {"images": 1}))
    with pytest.raises(InputError, match="none of iteration 7; there are 0, 1, 2"):
        evaluate(run, **chosen, checkpoints="7")
    for asked in ("best", "1,", "1,best"):
        with pytest.raises(InputError, match="expected 'last', 'all' or iterations"):
            evaluate(run, **chosen, checkpoints=asked)
    with pytest.raises(InputError, match="none of iteration 7; there are 0, 1, 2"):
        evaluate(run, **chosen, checkpoints="1,7")
    with pytest.raises(InputError, match="expected the folder of a CLIP model"):
        evaluate(run, **(chosen | {"clip": tmp_path}))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match="has no checkpoint"):
        evaluate(run, **chosen)
    assert not (run / FILE).exists()


def test_refuses_a_damaged_evaluation(run, prompts_file, clip_folder):
    evaluate(run, **settings(prompts_file, clip_folder))

    def without(*place):
        data = json.loads((run / FILE).read_text())
        part = data["points"]
        for key in place[:-1]:
            part = part[key]
        del part[place[-1]]
        return json.dumps(data)

    damaged = [
        "nothing like JSON", "[]", '{"format": 99}', '{"format": 1}', without(0),
        without(1, "figures", "reward", "per_prompt", 0), without(1, "figures", "recall"),
    ]  # fmt: skip
    data = json.loads((run / FILE).read_text())
    for point in data["points"]:
        del point["figures"]["diversity"]
    for damage in (*damaged, json.dumps(data)):
        (run / FILE).write_text(damage)
        with pytest.raises(InputError, match=r"evaluation\.json"):
            load_evaluation(run)
        with pytest.raises(InputError, match=r"evaluation\.json"):
            evaluate(run, **settings(prompts_file, clip_folder))


def test_precision_and_device_may_be_others_than_in_training(config, prompts_file, tmp_path):
    """A run that was trained on a GPU is looked at where there is none."""
    run = Trainer(config(iterations=1), tmp_path / "run").run()
    (run / "config.yaml").write_text(dump_config(config(iterations=1, model__device="cuda:7")))
    with pytest.raises(InputError, match=r"--device: 'cuda:7' is not available here; try 'auto' or 'cpu'"):
        open_policy(run)
    policy, _ = open_policy(run, dtype="bfloat16", device="cpu")
    assert policy.dtype == torch.bfloat16
    asked = {"prompts": prompts_file, "images": 2, "device": "cpu"}
    plain = load_evaluation(evaluate(run, **asked))
    assert plain.settings.dtype is None
    assert load_evaluation(evaluate(run, **asked, dtype="float32")) == plain
    half = load_evaluation(evaluate(run, **asked, dtype="bfloat16"))
    assert half.settings.dtype == "bfloat16"
    assert half.base.figures["reward"].mean != plain.base.figures["reward"].mean
    assert half.base.figures["diversity"].mean == pytest.approx(
        plain.base.figures["diversity"].mean, abs=0.05
    )
    with pytest.raises(InputError, match="--dtype: expected one of float32, bfloat16, float16; got 'bf16'"):
        evaluate(run, **asked, dtype="bf16")
