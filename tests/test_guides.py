"""The guides: their Python runs, their commands and configurations are valid, and what they promise of the adapter holds."""

import itertools
import re
import shlex
import sys
from pathlib import Path

import families
import pytest
import torch
import yaml
from diffusers import DDIMScheduler
from PIL import Image

from driftrl import TrainConfig, Trainer
from driftrl.checks import InputError
from driftrl.config import flat, load_config, parse_config
from driftrl.evaluation.card import export
from driftrl.pipelines import load_pipeline

GUIDES = Path(__file__).parents[1] / "docs" / "guide"
ROOT = Path(__file__).parents[1]


def blocks(guide, language):
    """What stands between ```language and ``` in a guide."""
    return re.findall(rf"^```{language}\n(.*?)^```", (GUIDES / guide).read_text(), re.DOTALL | re.MULTILINE)


def run_python(guide):
    """Run a guide's Python from top to bottom, here; a block that begins with a file's name is that file."""
    names = {"__name__": guide}
    for block in blocks(guide, "python"):
        if first := re.match(r"# (\w+\.py)\n", block):
            Path(first[1]).write_text(block)
        exec(compile(block, guide, "exec"), names)
    return names


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_rewards", None)


def first_run(here, **adapter):
    """As the guide of the adapter has it, with an adapter that can be seen."""
    settings = {
        "iterations": 1, "prompts": {"per_iteration": 2}, "selection": {"keep": 3}, "optimizer": {"learning_rate": 0.05},
        "sampling": {"steps": 4, "candidates": 4}, "logging": {"trackers": []}, "adapter": adapter,
    }  # fmt: skip
    return Trainer(parse_config(settings), here / "runs" / "first").run() / "checkpoints" / "000001"


def picture(pipe):
    pipe.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(0)
    return pipe("a cat", generator=draw, num_inference_steps=4, guidance_scale=1.0, output_type="pt").images


@pytest.mark.filterwarnings("ignore")  # what diffusers says of its own loading
def test_use_the_adapter(here):
    """Also with an alpha that is not the rank, which the converted file has to carry."""
    checkpoint = first_run(here, rank=4, alpha=8.0)
    names = run_python("use-the-adapter.md")
    model = TrainConfig().model
    pictures = {
        "base": picture(load_pipeline(model)),
        "merged": picture(type(names["pipe"]).from_pretrained("merged")),
    }
    export(Path("runs/first"), Path("first"), comfyui=True)
    for name, source in {"ours": checkpoint, "kohya": "first/comfyui.safetensors"}.items():
        pipe = load_pipeline(model)
        pipe.load_lora_weights(source)
        pictures[name] = picture(pipe)
    assert (pictures["ours"] - pictures["base"]).abs().max() > 0.01
    torch.testing.assert_close(pictures["kohya"], pictures["ours"], atol=2e-5, rtol=0)
    torch.testing.assert_close(pictures["merged"], pictures["ours"], atol=1e-3, rtol=0)
    assert picture(names["pipe"]).shape == pictures["ours"].shape
    assert all(seen(names[name]) for name in ("tuned", "half", "base"))


def seen(image):
    """Not black, which is what NaN becomes."""
    return max(high for _, high in image.getextrema()) > 100


@pytest.mark.filterwarnings("ignore")
def test_the_readme_draws_a_picture(here):
    """Its last line, on the base model."""
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("pipe("))
    exec(line, {"pipe": load_pipeline(TrainConfig().model)})
    with Image.open("cat.png") as image:
        assert seen(image)


def test_your_own_reward(here):
    run_python("your-own-reward.md")
    assert (here / "runs/red-quick/checkpoints/000001/pytorch_lora_weights.safetensors").is_file()


@pytest.mark.filterwarnings("ignore")  # of a reward on so few images
def test_from_python(here):
    names = run_python("from-python.md")
    assert names["images"].shape == (2, 2, 3, 64, 64) and not torch.equal(names["images"], names["before"])
    assert [point.label for point in names["evaluation"].points] == ["base", "000003"]


def test_your_own_prompts(here, capsys):
    run_python("your-own-prompts.md")
    assert "min.txt" in capsys.readouterr().out


def test_the_sizes_of_the_large_models(here, capsys):
    """The table says what the snippet prints."""
    run_python("sdxl-and-flux.md")
    printed = dict(re.findall(r"^(.+): .* ([\d.]+ GiB) in bf16$", capsys.readouterr().out, re.MULTILINE))
    text = (GUIDES / "sdxl-and-flux.md").read_text()
    networks = (
        *("SDXL", "SD3 medium", "FLUX.1", "FLUX.2 klein 4B", "FLUX.2 dev", "SANA 1.6B"),
        *("Qwen-Image", "Z-Image"),
    )
    assert all(f"| {name} | {printed[name]} |" in text for name in networks)
    assert all(
        f"{printed[name]} ({name})" in text
        for name in ("T5-XXL", "Gemma 2", "Mistral Small 3", "Qwen2.5-VL", "Qwen3 4B")
    )


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=() if n in (0, 3, 5) else pytest.mark.slow) for n in range(7)]
)
def test_the_configurations_of_the_large_models(here, encoder_folder, number):
    """As they stand they are valid; on a tiny pipeline of their classes they train."""
    data = yaml.safe_load(blocks("sdxl-and-flux.md", "yaml")[number])
    parse_config(data)
    make = ("sdxl", "sd3", "flux", "klein", "sana", "qwen", "zimage")[number]
    data["model"]["path"] = str(getattr(families, f"make_{make}")(here / "pipeline"))
    data |= {"iterations": 1, "reward": "incompressibility", "shaping": {"encoder": str(encoder_folder)}}
    assert data["selection"] == {"strategy": "all", "keep": 8}
    data |= {"selection": {"strategy": "all", "keep": 4}, "logging": {"trackers": []}}
    data["prompts"]["per_iteration"] = 1
    data["sampling"] |= {"steps": 4, "candidates": 4, "height": 32, "width": 32}
    run = Trainer(parse_config(data), here / "run").run()
    assert (run / "checkpoints/000001/pytorch_lora_weights.safetensors").is_file()


def test_the_configurations_that_readers_begin_with(monkeypatch, tmp_path):
    """Of the README and of those who come from elsewhere: as they stand they are valid, and what their words say."""
    monkeypatch.chdir(ROOT)
    (readme,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    config = parse_config(yaml.safe_load(readme))
    shaped = load_config(Path("experiments/shaped-kl.yaml"))
    for section, keys in {
        "selection": ["strategy", "keep"],
        "shaping": ["ratio"],
        "advantage": ["scale"],
        "objective": ["kl_weight"],
    }.items():
        for key in keys:
            assert getattr(getattr(config, section), key) == getattr(getattr(shaped, section), key)
    assert config.sampling.candidates == shaped.sampling.candidates
    (mine,) = blocks("coming-from.md", "yaml")
    path = tmp_path / "mine.yaml"
    path.write_text(mine.replace("experiments/", f"{ROOT}/experiments/"))
    assert load_config(path).advantage.baseline == "running"


@pytest.mark.parametrize("guide", ["coming-from.md", "troubleshooting.md"])
def test_settings_that_guides_name_exist(guide):
    """`section.key` in backquotes, but for the columns of other projects."""
    lines = (GUIDES / guide).read_text().splitlines()
    text = "\n".join("|".join(line.split("|")[:2]) if guide == "coming-from.md" and line.startswith("|") else line
                     for line in lines)  # fmt: skip
    known = flat(TrainConfig())
    sections = {key.split(".")[0] for key in known if "." in key}
    named = {
        key
        for key in re.findall(r"`(?:\S* )?([a-z_]+\.[a-z_]+)(?::[^`]*)?`", text)
        if key.split(".")[0] in sections
    }
    assert len(named) > 15
    assert named <= known.keys()


def test_other_projects_names_are_answered_with_ours():
    """Every name in the table, as a key of a configuration."""
    rows = [line.split("|")[1:-1] for line in (GUIDES / "coming-from.md").read_text().splitlines()
            if re.match(r"\| `[a-z]", line) and not line.startswith("| `--")]  # fmt: skip
    assert len(rows) > 20
    for ours, *theirs in rows:
        own = [name.split(":")[0] for name in re.findall(r"`([^`]+)`", ours)]
        keys = {name.split(".")[-1] for cell in theirs for name in re.findall(r"`([a-z_.]+)`", cell)}
        if (
            "..." in "".join(theirs)
            or " x " in ours
            or any(len(re.findall("`", cell)) > 2 for cell in theirs)
        ):
            continue  # a product of several, or part of a name
        for section, name in re.findall(r"`(train|sample|pretrained)\.([a-z_]+)`", " ".join(theirs)):
            with pytest.raises(InputError) as error:
                parse_config({section: {name: 1}})
            assert any(f"{section}.{name} is '{one}'" in str(error.value) for one in own)
        for key in keys - {"model", "revision"}:
            with pytest.raises(InputError) as error:
                parse_config({key: 1})
            assert any(name in str(error.value) for name in own)


@pytest.mark.parametrize("guide", sorted(path.name for path in GUIDES.glob("*.md")))
def test_commands_have_settings_that_exist(guide, monkeypatch):
    """Files are there, and every --set is a key with a value of its type."""
    monkeypatch.chdir(ROOT)
    for line in "".join(blocks(guide, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "driftrl" not in words or words[words.index("driftrl") + 1] not in ("train", "estimate"):
            continue
        arguments = words[words.index("driftrl") + 2 :]
        files = [Path(word) for word in arguments if word.endswith(".yaml")]
        settings = [value for flag, value in itertools.pairwise(arguments) if flag == "--set"]
        load_config(files[0] if files else None, settings)


def test_diffusers_own_ddim_draws_nan_from_pure_noise():
    """What use-the-adapter.md says of it; when this fails, diffusers has mended it and the guide can lose a sentence."""
    scheduler = DDIMScheduler.from_config(load_pipeline(TrainConfig().model).scheduler.config)

    def broken(eta):
        found = []
        for steps in range(2, 51):
            scheduler.set_timesteps(steps)
            x = torch.ones(1, 4, 2, 2)
            drawn = scheduler.step(x, scheduler.timesteps[0], x, eta=eta, variance_noise=x).prev_sample
            found += [steps] if not drawn.isfinite().all() else []
        return found

    def under_the_root(steps):
        scheduler.set_timesteps(steps)
        first = int(scheduler.timesteps[0])
        before = first - scheduler.config.num_train_timesteps // steps
        return float(1 - scheduler.alphas_cumprod[before] - scheduler._get_variance(first, before))

    assert broken(1.0)  # at which numbers of steps, rounding decides, which differs between processors
    assert max(abs(under_the_root(steps)) for steps in range(2, 51)) < 1e-6  # 0, but for rounding
    assert broken(0.999) == []


def prose(page):
    return re.sub(r"(?ms)^```.*?^```", "", page.read_text())


def anchors(page):
    """Of its headings, as GitHub and most renderers make them."""
    headings = (
        re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text) for text in re.findall(r"(?m)^#+ (.*)$", prose(page))
    )
    return {re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-") for text in headings}


def test_every_link_of_the_documentation_leads_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("experiments/**/*.md")]
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\(([^()\s]+)\)", prose(page))
        if ":" not in link
    ]
    assert len(links) > 100
    for page, link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"
