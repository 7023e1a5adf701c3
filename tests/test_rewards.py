"""Rewards and encoders: the real classes at tiny size, against a straight computation."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import driftrl
from conftest import save_tokenizer, text_settings
from driftrl import TrainConfig, Trainer
from driftrl.build import build_encoder, build_reward
from driftrl.checks import InputError
from driftrl.config import load_config
from driftrl.pictures import LONGEST, candidates_grid, grid
from driftrl.preprocess import CLIP_MEAN, CLIP_STD, Preprocessing
from driftrl.rewards.clip import CLIPReward
from driftrl.rewards.compressibility import compressibility
from driftrl.rewards.tower import CLIPTower


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip") / "model"
    tokenizer = save_tokenizer(folder)
    torch.manual_seed(3)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 8}  # fmt: skip
    text = text_settings(tokenizer) | {"projection_dim": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    return folder


def test_clip_reward_is_scaled_cosine(clip_folder):
    from transformers import CLIPModel, CLIPTokenizer

    images, prompts = torch.rand(3, 3, 16, 16), ["a cat", "a dog", "a cat"]
    model, tokenizer = CLIPModel.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    tokens = tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        expected = model(pixel_values=(images - mean) / std, **tokens).logits_per_image.diag()
    reward = CLIPReward(CLIPTower(clip_folder, batch_size=2))
    torch.testing.assert_close(reward(images, prompts), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(reward(images.flip(0), prompts[::-1]).flip(0), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(48, 64), (48, 67), (67, 48), (24, 40), (9, 12), (10, 10)])
def test_preprocessing_resizes_as_pil_does(size, mode):
    """Every pixel of 8-bit pictures, smaller and larger; 67 / 2 is rounded down, as in transformers and torchvision."""
    from transformers.image_transforms import get_resize_output_image_size

    pixels = torch.randint(0, 256, (2, 3, *size), generator=torch.Generator().manual_seed(3))
    found = Preprocessing(24, None, (0, 0, 0), (1, 1, 1), mode)(pixels / 255)
    height, width = get_resize_output_image_size(np.zeros((3, *size)), 24, default_to_square=False)
    for ours, picture in zip(found, pixels, strict=True):
        image = Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy().astype(np.uint8)))
        theirs = np.asarray(image.resize((width, height), getattr(Image.Resampling, mode.upper())))
        assert np.array_equal((ours.permute(1, 2, 0) * 255).round().numpy(), theirs)


def test_compressibility_is_the_size_of_the_jpeg():
    flat, noisy = torch.full((3, 32, 32), 0.5), torch.rand(3, 32, 32)
    scores = compressibility(torch.stack([flat, noisy]), ["", ""])
    buffer = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), 128, np.uint8)).save(buffer, "JPEG", quality=95)
    assert scores[0] == pytest.approx(-buffer.tell() / 1000)
    assert scores[0] > scores[1]


def test_encoder_does_not_depend_on_the_batch(encoder_folder):
    images = torch.rand(5, 3, 64, 64)
    encoder = build_encoder(str(encoder_folder), torch.device("cpu"))
    whole = encoder(images)
    assert whole.shape == (5, 16)
    encoder.batch_size = 2
    torch.testing.assert_close(encoder(images), whole, atol=1e-5, rtol=1e-5)


def test_unknown_names():
    with pytest.raises(InputError, match="did you mean 'compressibility'"):
        build_reward("compresibility", torch.device("cpu"))
    with pytest.raises(InputError, match=r"shaping\.encoder"):
        build_encoder("./nowhere", torch.device("cpu"))


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A distribution as pip would have installed it, with one good entry point and one whose module is not there."""
    info = tmp_path / "my_rewards-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-rewards\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[driftrl.rewards]\nbluest = my_rewards_of_a_test:blue\nbroken = no_such_module_at_all:score\n"
        "number = my_rewards_of_a_test:NUMBER\n"
    )
    (tmp_path / "my_rewards_of_a_test.py").write_text(
        "NUMBER = 3\n\ndef blue(images, prompts):\n    return images[:, 2].mean((1, 2))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_reward_by_entry_point(plugin):
    images = torch.rand(3, 3, 4, 4)
    torch.testing.assert_close(
        build_reward("bluest", torch.device("cpu"))(images, [""] * 3), images[:, 2].mean((1, 2))
    )


def test_an_entry_point_is_among_the_names_that_are_suggested(plugin):
    with pytest.raises(InputError, match="did you mean 'bluest'"):
        build_reward("blues", torch.device("cpu"))


def test_an_entry_point_that_cannot_be_loaded_is_bad_input(plugin):
    with pytest.raises(InputError, match=r"reward: 'broken' cannot be loaded.*no_such_module_at_all"):
        build_reward("broken", torch.device("cpu"))
    with pytest.raises(InputError, match="reward: number is no function"):
        build_reward("number", torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./mine.py:score", "expected module:function, .*; got the path"),
        ("mine:score", r"module 'mine' has no attribute 'score'"),
        ("yours:score", r"No module named 'yours'; expected yours\.py in this folder, or a module"),
        ("mine.score", r"got 'mine\.score'; did you mean 'mine:score'\?"),
        ("localhost:8300", r"did you mean 'http://localhost:8300'\?"),
        ("broken_reward:score", "SyntaxError"),
        ("gloomy_reward:score", "RuntimeError: no licence"),
        ("leaving_reward:score", "SystemExit: 5"),
        ("stateful_reward:State", r"is a class; expected .* an instance"),
        (
            "stateful_reward:alone",
            r"expected \(images, prompts\) -> Tensor\[N\], or with .*; too many positional arguments",
        ),
    ],
)
def test_rewards_that_cannot_be_imported_are_one_message(tmp_path, monkeypatch, name, message):
    """Whatever a user's module does at its import."""
    (tmp_path / "mine.py").write_text("")
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "broken_reward.py").write_text("x = (\n")
    (modules / "gloomy_reward.py").write_text("raise RuntimeError('no licence')\n")
    (modules / "leaving_reward.py").write_text("raise SystemExit(5)\n")
    (modules / "stateful_reward.py").write_text("class State:\n    pass\ndef alone(images):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(modules)])
    for name_of_module in ("mine", "yours"):
        monkeypatch.delitem(sys.modules, name_of_module, raising=False)
    with pytest.raises(InputError, match=message):
        build_reward(name, torch.device("cpu"))


def brightness(images, prompts):
    """A reward as one writes it in Python."""
    return images.mean((1, 2, 3))


def test_a_function_given_in_python_is_kept_by_its_name(config, tmp_path):
    parts = [{"name": brightness, "weight": 0.5}, {"name": "compressibility"}]
    assert [part.name for part in TrainConfig(reward=parts).reward] == [
        f"{__name__}:brightness",
        "compressibility",
    ]
    run = Trainer(config(iterations=1, reward=brightness), tmp_path / "run").run()
    assert load_config(run / "config.yaml").reward == f"{__name__}:brightness"
    with pytest.raises(InputError, match=r"is a class; expected .* reward = Identity\(\)"):
        build_reward(str(TrainConfig(reward=torch.nn.Identity).reward), torch.device("cpu"))
    with pytest.raises(InputError, match="script or notebook that trained: put it into a module"):
        build_reward("__main__:no_such_function", torch.device("cpu"))


def test_a_run_made_in_python_is_evaluated_in_python(config, tmp_path):
    (tmp_path / "one.txt").write_text("a cat\n")
    run = Trainer(config(iterations=1), tmp_path / "run").run()
    assert driftrl.evaluate(run, prompts=str(tmp_path / "one.txt"), images=2) == run
    assert {"evaluation.json", "report.html", "report.png"} <= {path.name for path in run.iterdir()}


def test_long_labels_leave_room_for_the_pictures():
    narrow, wide = (grid([torch.zeros(2, 3, 8, 8)], [label]) for label in ("m" * LONGEST, "m" * 2800))
    assert wide.width <= narrow.width + 8


def test_letters_beyond_english_are_drawn_as_they_are():
    """Pillow's own font has a box for each of them, one like the other."""
    drawn = {text: grid([torch.zeros(0, 3, 8, 8)], [text]).tobytes() for text in ("ж", "д", "é", "ü", "θ")}
    assert len(set(drawn.values())) == len(drawn)


def test_a_font_is_looked_for_that_has_the_letters(monkeypatch):
    from matplotlib import font_manager

    from driftrl import fonts

    assert fonts.families()[0] == "DejaVu Sans"
    assert fonts.font_file(["кошка", "\u5e7f"]).name == "DejaVuSans.ttf" or len(fonts.families()) > 1
    monkeypatch.setattr(fonts, "families", lambda: ["STIXGeneral", "DejaVu Sans"])
    there = {font.name for font in font_manager.fontManager.ttflist}
    assert "STIXGeneral" in there
    assert fonts.font_file(["a cat"]).name == "STIXGeneral.ttf"
    assert fonts.font_file(["\u05d0"]).name == "DejaVuSans.ttf"  # aleph, of Hebrew
    assert fonts.font_file(["\U0001f408"]).name == "STIXGeneral.ttf"  # which neither has


def test_pictures_keep_their_proportions_and_small_ones_are_enlarged():
    for shape, cell in (
        ((16, 16), (72, 72)),
        ((64, 64), (72, 72)),
        ((512, 256), (128, 256)),
        ((90, 120), (120, 90)),
    ):
        images = [torch.zeros(2, 3, *shape)]
        assert grid(images, [""]).size == (2 * (cell[0] + 4) + 8, cell[1] + 12)
    assert (
        candidates_grid(
            torch.zeros(1, 1, 3, 512, 512), ["a"], torch.zeros(1, 1), torch.zeros(1, 1).long()
        ).height
        < 180
    )
