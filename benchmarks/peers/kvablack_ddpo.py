"""ddpo-pytorch on the work of `work.py`: its own training script, from the checkout that the first argument names.

The script is not copied and not changed: it is loaded from the checkout, gets its own configuration with our numbers, and
times are taken around what it calls. Its libraries are of 2023 (`ddpo-constraints.txt`), so what they cannot read in a
pipeline folder of today is put right around them, below; nothing of that adds to its work.
(The file isn't called ddpo_pytorch.py, for then the script would import it in place of its own package.)
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import diffusers.models.vae
import torch
import transformers
from work import PROMPTS, Clock, parse, report, reward


def read_new_folders(model: Path) -> None:
    """Let the libraries read the networks in ``model`` as newer releases do.

    The names of CLIP's weights lost a prefix in transformers 5, and an autoencoder without attention in its middle
    cannot be said in diffusers 0.17's configuration, though its block can be built so.
    """
    transformers.CLIPTextModel.base_model_prefix = "text_model"
    vae = json.loads((model / "vae/config.json").read_text())
    if not vae.get("mid_block_add_attention", True):
        block = partial(diffusers.models.vae.UNetMidBlock2D, add_attention=False)
        diffusers.models.vae.UNetMidBlock2D = block


def schedule(model: Path, steps: int) -> Any:
    """A DDIMScheduler, to stand where the script looks it up, that knows two settings which are newer than it is.

    ``rescale_betas_zero_snr`` is algorithm 1 of arXiv 2305.08891, ``timestep_spacing: trailing`` is an offset of the
    "leading" spacing (where ``steps`` divide the training's steps). Costs nothing at run time.
    """
    config = json.loads((model / "scheduler/scheduler_config.json").read_text())
    if config.get("timestep_spacing") == "trailing":
        config["steps_offset"] = config["num_train_timesteps"] // steps - 1
    if config.get("rescale_betas_zero_snr"):
        root = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.double().sqrt()
        product = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
        ratios = torch.cat([product[:1], product[1:] / product[:-1]])
        config["trained_betas"] = (1 - ratios).tolist()
    made = diffusers.DDIMScheduler.from_config(config)
    return types.SimpleNamespace(from_config=lambda _: made)


def load_script(checkout: Path) -> types.ModuleType:
    """The checkout's scripts/train.py as a module, without Weights & Biases: logs apart, as for everyone.

    accelerate leaves a tracker out whose package is missing; the script itself only makes pictures for it.
    """
    sys.path.insert(0, str(checkout))
    sys.modules["wandb"] = types.ModuleType("wandb")
    sys.modules["wandb"].Image = lambda *_, **__: None  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("train", checkout / "scripts/train.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.FLAGS(["train.py", f"--config={checkout / 'config/base.py'}"])
    return script


def configure(config: Any, args: Any, logs: str) -> None:
    """Its configuration, where the work differs from its defaults."""
    images = args.prompts * args.candidates
    changes = {
        "logdir": logs,
        "num_epochs": args.iterations + 1,
        "save_freq": 10**9,
        "mixed_precision": "no",
        "prompt_fn": "peers_prompt",
        "reward_fn": "peers_reward",
        "pretrained.model": args.model,
        "sample.num_steps": args.steps,
        "sample.guidance_scale": args.guidance,
        "sample.batch_size": args.rollout_batch,
        "sample.num_batches_per_epoch": images // args.rollout_batch,
        "train.batch_size": args.update_batch,
        "train.gradient_accumulation_steps": images // args.update_batch,
        "train.timestep_fraction": args.trained / args.steps + 1e-9,
        "train.cfg": args.guidance > 1,
        "train.learning_rate": 1e-4,
        "per_prompt_stat_tracking.min_count": 2,
    }
    config.update_from_flattened_dict(changes)


class Times:
    """When each iteration began, and when its pictures were written for the log, seen from what the script calls."""

    def __init__(self, images: int) -> None:
        self.images = images
        self.clock = Clock()
        self.laps: list[dict[str, float]] = []
        self.calls = itertools.count()

    def prompt(self, prompts: int) -> tuple[str, dict[str, Any]]:
        """The script's prompt function: each prompt in turn. An iteration begins with its first."""
        call = next(self.calls)
        if call % self.images == 0:
            self.end()
            self.began = time.perf_counter()
        return PROMPTS[call % self.images % prompts], {}

    @contextlib.contextmanager
    def pictures(self) -> Iterator[str]:
        """In place of the folder into which the script writes JPEG files for the log, when the rollout is done."""
        self.sampled = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            yield folder
        self.logged = time.perf_counter()

    def end(self) -> None:
        """The end of an iteration, if one has begun."""
        now, lap = time.perf_counter(), self.clock.lap()
        if "decode" in lap:
            rollout = self.sampled - self.began - lap["decode"] - lap["reward"]
            update = now - self.logged
            self.laps.append(
                {"total": self.sampled - self.began + update, **lap, "rollout": rollout, "update": update}
            )


def main() -> None:
    """Train, and report the time of each iteration."""
    checkout = Path(sys.argv.pop(1)).resolve()
    args = parse(__doc__)
    model = Path(args.model)
    warnings.simplefilter("ignore")
    read_new_folders(model)
    script = load_script(checkout)
    times = Times(args.prompts * args.candidates)
    pipelines = []

    def load(*names: Any, **options: Any) -> diffusers.StableDiffusionPipeline:
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(*names, **options)
        pipeline.vae.decode = times.clock.timed("decode", pipeline.vae.decode)
        pipelines.append(pipeline)
        return pipeline

    script.StableDiffusionPipeline = types.SimpleNamespace(from_pretrained=load)
    script.DDIMScheduler = schedule(model, args.steps)
    script.LoRAAttnProcessor = partial(script.LoRAAttnProcessor, rank=args.rank)
    script.tempfile = types.SimpleNamespace(TemporaryDirectory=times.pictures)
    script.ddpo_pytorch.prompts.peers_prompt = partial(times.prompt, args.prompts)
    rewarded = times.clock.timed("reward", lambda images, prompts, metadata: (reward(images), {}))
    script.ddpo_pytorch.rewards.peers_reward = lambda: rewarded
    with tempfile.TemporaryDirectory() as logs:
        configure(script.FLAGS.config, args, logs)
        script.main(None)
        times.end()
    trained = sum(p.numel() for p in pipelines[0].unet.parameters() if p.requires_grad)
    report(times.laps[1:], trained=trained, torch=torch.__version__)


if __name__ == "__main__":
    main()
