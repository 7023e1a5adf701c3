"""Rewards and encoders that are objects in Python: trained with, measured with, and asked for again elsewhere."""

import functools

import pytest
import torch

from driftrl import TrainConfig, Trainer, evaluate, objects
from driftrl.build import build_encoder, build_reward
from driftrl.checks import InputError
from driftrl.config import load_config
from driftrl.evaluation.evaluate import load_evaluation

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch):
    monkeypatch.setattr(objects, "_KNOWN", {})


class Brightness:
    def __init__(self, weight):
        self.weight, self.calls = weight, 0

    def __call__(self, images, prompts):
        self.calls += 1
        return self.weight * images.mean((1, 2, 3))


def colours(images):
    return torch.nn.functional.normalize(images.mean((2, 3)) + 0.1, dim=-1)


def test_a_run_with_objects_is_trained_resumed_and_measured(config, tmp_path):
    reward, closure = Brightness(10.0), lambda images: colours(images) * 1.0
    run = Trainer(config(reward=reward, shaping__encoder=closure, iterations=1), tmp_path / "run").run()
    assert reward.calls > 0
    saved = load_config(run / "config.yaml")
    assert (saved.reward, saved.shaping.encoder) == ("python:Brightness", "python:lambda")
    two = {"prompts": "animals5", "images": 3}
    here = load_evaluation(
        evaluate(run, **two, rewards=functools.partial(Brightness.__call__, Brightness(2.0)))
    )
    assert here.settings.rewards == ["python:Brightness", "python:partial"]
    figures = here.base.figures
    assert figures["reward"].mean == pytest.approx(5 * figures["reward/python:partial"].mean)
    own = load_evaluation(evaluate(run, **two, encoder=colours, out=tmp_path / "own")).settings.encoder
    assert own == f"{__name__}:colours"
    objects._KNOWN.clear()  # another process
    with pytest.raises(
        InputError, match=r"reward: 'python:Brightness' was an object .*register\('Brightness', "
    ):
        Trainer(resume=run)
    objects.register("Brightness", Brightness(10.0))
    with pytest.raises(InputError, match=r"shaping\.encoder: 'python:lambda' was an object"):
        Trainer(resume=run)
    objects.register("lambda", closure)
    assert Trainer(load_config(run / "config.yaml", ["iterations=2"]), resume=run).run() == run


def test_an_encoder_of_a_module_is_called_by_that(config, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def dark(images):\n    return images.mean((2, 3)) + 0.1\n\nsize = 3\n")
    monkeypatch.chdir(tmp_path)
    encoder = build_encoder("mine:dark", CPU)
    assert torch.equal(encoder(torch.zeros(2, 3, 4, 4)), torch.full((2, 3), 0.1))
    for name, message in (
        ("mine:size", r"expected a function of images .*got 3"),
        ("mine:light", r"'mine:light' cannot be imported: .*no attribute 'light'"),
        ("yours:dark", r"expected yours\.py in this folder"),
        ("./mine.py:dark", r"got the path '\./mine\.py:dark'"),
    ):
        with pytest.raises(InputError, match=rf"^shaping\.encoder: .*{message}"):
            build_encoder(name, CPU)


def test_each_object_has_a_name_of_its_own():
    one, two = Brightness(1.0), Brightness(2.0)
    names = [objects.named(each) for each in (one, two, one)]
    assert names == ["python:Brightness", "python:Brightness-2", "python:Brightness"]
    parts = TrainConfig(reward=[{"name": one}, {"name": two, "weight": 0.5}]).reward
    assert [part.name for part in parts] == names[:2]
    assert objects.named(colours) == f"{__name__}:colours"  # a module has it
    assert build_reward(names[1], CPU) is two


def test_what_is_no_function_or_no_features_is_refused():
    for name, thing, message in (
        ("a b", colours, "letters"),
        ("a", 3, "called"),
        ("a", Brightness, "called"),
    ):
        with pytest.raises(InputError, match=f"register: expected .*{message}"):
            objects.register(name, thing)
    wrong = build_encoder(objects.register("flat", lambda images: images.flatten()), CPU)
    with pytest.raises(
        InputError, match=r"python:flat: expected a tensor of features \[2, D\].*got shape \[24\]"
    ):
        wrong(torch.zeros(2, 3, 2, 2))
    with pytest.raises(InputError, match="images, prompts"):
        build_reward(objects.register("one", lambda images: images), CPU)
