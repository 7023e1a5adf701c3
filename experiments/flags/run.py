"""The plans of this project on the flags of `world.py`: the same methods and settings, in minutes instead of days.

    python experiments/flags/run.py experiments/plans/methods.yaml            # every method, eight seeds of each
    python experiments/flags/run.py experiments/plans/methods.yaml --rates    # the learning rate of every method
    python experiments/flags/run.py experiments/plans/methods.yaml --scales   # what the adapters give, turned down
    python experiments/flags/run.py experiments/plans/paper-03-shaping.yaml --seeds 4

Results go to docs/flags/PLAN.json, run by run: what is there is not made again. `python docs/figures/results.py` makes
tables and figures of them. Runs of a plan are as the plan has them but for what `SETTINGS` says; their number of
iterations, their seeds and their evaluation are this program's own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import world
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor

from driftrl.build import method_of, objective_of, prompt_noise_of, schedule_of
from driftrl.checks import InputError, NotFiniteError
from driftrl.config import TrainConfig, merged, parse_config
from driftrl.evaluation.evaluate import REFERENCE
from driftrl.evaluation.pareto import hypervolume
from driftrl.evaluation.studio import Instruments, measure
from driftrl.experiment.plan import expand, load_plan, nested
from driftrl.files import write_text
from driftrl.rollout import NO_NOISE, PromptNoise, rollout
from driftrl.trainer import TrainingLoop
from driftrl.types import Reward

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/flags"
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Job(NamedTuple):
    """A run to make."""

    name: str
    config: TrainConfig
    points: int
    """How often it is measured."""
    scales: tuple[float, ...] = ()
    """What its adapter is multiplied by, and measured once more, at the end."""


FIGURES = ("reward", "diversity", "diversity/clip", "recall", "vendi", "coverage")
"""What is kept; `diversity/clip` is by the features that no training sees."""
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
TUNING, AGAIN = (100, 101), (102, 103)
"""Seeds of the search for the learning rate, which the comparison does not use again: all rates have the first ones, and
each method's two best the others."""
SETTINGS: dict[str, Any] = {
    "objective.timesteps": 1.0,  # nine numbers a picture: every step matters
    "optimizer.learning_rate": 2e-3,
    "optimizer.batch_size": 1024,
    "model.device": "cpu",
}
RANK, IMAGES, BATCH = 8, 40, 1024
REWARDS = {
    "tiny-animals": (world.reward, world.reward),
    "compressibility": (world.brightness, world.brightness),
    "fooled": (world.fooled, world.reward),
    "raised": (world.raised, world.reward),
}
"""What stands here for the embedded model's rewards, and rewards with a fault: what is trained on, and what is meant."""
ENCODERS = {
    "tiny-animals": lambda policy: world.encoder,
    "policy:latents": lambda policy: world.colours,
    "policy:mid-block": lambda policy: policy.activations,
}


def here(config: TrainConfig, iterations: int) -> TrainConfig:
    """A plan's configuration, on flags."""
    own = nested({**SETTINGS, "iterations": iterations})
    own["prompts"] = {"per_iteration": min(config.prompts.per_iteration, len(world.COUNTRIES))}
    return parse_config(merged(config.model_dump(mode="json"), own))


class Bench:
    """Measures a policy beside the base model, which is drawn twice: once as what recall refers to."""

    def __init__(self, policy: world.FlagPolicy, prompts: tuple[str, ...], reward: Reward) -> None:
        """Draw the reference."""
        self.policy, self.prompts = policy, prompts
        self.tools = Instruments({"reward": reward}, world.encoder, world.unseen)
        self.conditioning = policy.encode(prompts)
        with policy.reference():
            self.reference = self.tools.read(self._draw(REFERENCE, NO_NOISE), prompts).features

    def _draw(self, seed: int, noise: PromptNoise) -> Tensor:
        keys = [(seed, 0, prompt) for prompt in range(len(self.prompts))]
        self.policy.add_noise_in(None)  # whatever training does
        return rollout(self.policy, self.conditioning, keys, IMAGES, BATCH, noise).images

    def measure(self, noise: PromptNoise = NO_NOISE) -> tuple[list[float], Tensor]:
        """`FIGURES`, means over prompts, and the pictures [P, N, 3, 1, 3]."""
        images = self._draw(0, noise)
        found = measure(self.tools.read(images, self.prompts), self.reference)
        return [sum(found[name]) / len(found[name]) for name in FIGURES], images


def loop_of(policy: world.FlagPolicy, config: TrainConfig) -> TrainingLoop:
    """The package's loop, as `driftrl.build.build_loop` makes it of pipelines."""
    optimizer = torch.optim.AdamW(
        policy.parameters(), config.optimizer.learning_rate, config.optimizer.betas, weight_decay=0.0
    )
    gated = config.objective.kl_weight > 0 and config.objective.kl_share < 1
    return TrainingLoop(
        policy,
        REWARDS[config.reward][0],
        ENCODERS[config.shaping.encoder](policy),
        world.COUNTRIES,
        method_of(config),
        objective_of(config, policy.device),
        optimizer,
        Path("nowhere"),
        seed=config.seed,
        prompts_per_iteration=config.prompts.per_iteration,
        rollout_batch=BATCH,
        judges=(world.judge,) if gated else (),
        schedule=schedule_of(config),
        ema_decay=config.optimizer.ema_decay,
    )


def train(
    model: world.Denoiser, config: TrainConfig, points: int, scales: Sequence[float] = ()
) -> Iterator[tuple[float, list[float], Tensor]]:
    """Train, and measure before and at ``points`` even distances: (iteration, `FIGURES`, pictures [P, N, 3, 1, 3]); then the
    end once more, the adapter at each of ``scales``: (scale, the same).
    """
    policy = world.FlagPolicy(model, config.sampling.steps, RANK, config.seed)
    loop = loop_of(policy, config)
    bench = Bench(policy, world.COUNTRIES, REWARDS[config.reward][1])
    every = max(1, config.iterations // points)
    with policy.reference():
        yield 0, *bench.measure()
    for iteration in range(1, config.iterations + 1):
        loop.iterate()
        if iteration % every == 0:
            with loop.memory.handed_out(policy):
                found = bench.measure(prompt_noise_of(config, "test"))
            yield iteration, *found
    trained = [change.up.detach().clone() for change in policy.changes]
    for scale in scales:
        with torch.no_grad():
            for change, up in zip(policy.changes, trained, strict=True):
                change.up.copy_(scale * up)
        yield scale, *bench.measure(prompt_noise_of(config, "test"))


def base_model() -> world.Denoiser:
    """The pretrained model, made at the first call."""
    file = ROOT / "runs/flags/base.safetensors"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(world.pretrained().state_dict(), file)
    model = world.Denoiser()
    model.load_state_dict(load_file(file))
    return model


def one(job: Job) -> dict[str, Any]:
    """One run, as it goes into the file; one that comes apart has the points until then."""
    name, config, points, scales = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # a collapse is what is looked for
    curve: list[list[float]] = []
    try:
        for at, figures, _ in train(base_model(), config, points, scales):
            curve.append([at, *(float(f"{value:.4g}") for value in figures)])
    except NotFiniteError:
        scales = ()
    run = {"name": name, "seed": config.seed, "rate": config.optimizer.learning_rate}
    path = len(curve) - len(scales)
    return run | {"points": curve[:path]} | ({"scaled": curve[path:]} if scales else {})


def volume(run: dict[str, Any], corner: float) -> float:
    """Hypervolume of reward and diversity above ``corner``, the base model's reward."""
    return hypervolume([point[1:3] for point in run["points"]], (corner, 0.0))


def ranked_rates(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Of each method the rates from the best to the worst: most seeds first, then the largest mean hypervolume."""
    found: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        by_rate = found.setdefault(run["name"], {})
        by_rate.setdefault(run["rate"], []).append(volume(run, run["points"][0][1]))

    def merit(volumes: list[float]) -> tuple[int, float]:
        return len(volumes), sum(volumes) / len(volumes)

    return {
        name: sorted(rates, key=lambda rate: merit(rates[rate]), reverse=True)
        for name, rates in found.items()
    }


def best_rates(file: Path) -> dict[str, float]:
    """The first of these; nothing where there was no search."""
    runs = json.loads(file.read_text())["runs"] if file.is_file() else []
    return {name: rates[0] for name, rates in ranked_rates(runs).items()}


def planned(path: Path, iterations: int) -> dict[str, TrainConfig]:
    """The configurations of a plan, by name, in its order; of several seeds the first."""
    runs: dict[str, TrainConfig] = {}
    for run in expand(load_plan(path), path):
        runs.setdefault(run.config.name, here(run.config, iterations))
    return runs


def jobs_of(
    configs: dict[str, TrainConfig],
    rates: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    points: int,
    scales: tuple[float, ...] = (),
) -> list[Job]:
    """Every configuration at each of its rates, seed by seed."""
    return [
        Job(
            name,
            config.model_copy(update={"seed": seed, "optimizer": at_rate(config, rate)}),
            points,
            scales,
        )
        for seed in seeds
        for name, config in configs.items()
        for rate in rates[name]
    ]


def at_rate(config: TrainConfig, rate: float) -> Any:
    """The optimiser's settings at another learning rate."""
    return config.optimizer.model_copy(update={"learning_rate": rate})


def key(job: Job) -> tuple[str, int, float]:
    """What a run is found again by."""
    return job[0], job[1].seed, job[1].optimizer.learning_rate


class Book:
    """The file that results are in."""

    def __init__(self, file: Path, name: str, iterations: int, against: str) -> None:
        """Read it, if it is there.

        Raises:
            InputError: if its runs are of another length.
        """
        self.file = file
        self.data: dict[str, Any] = {
            "plan": name,
            "iterations": iterations,
            "against": against,
            "figures": FIGURES,
            "runs": [],
        }
        if file.is_file():
            self.data |= json.loads(file.read_text())
        if self.data["iterations"] != iterations:
            raise InputError(
                f"{file} has runs of {self.data['iterations']} iterations; give as many, or another --out"
            )

    def make(self, jobs: list[Job], processes: int | None, only: bool = False) -> None:
        """Make what is missing of ``jobs``; with ``only`` forget runs of these methods at other rates, of no seed else."""
        wanted = {(name, rate) for name, _, rate in map(key, jobs)}
        found = {(run["name"], run["seed"], run["rate"]): run for run in self.data["runs"]}
        if only:
            self.data["runs"] = [run for (name, _, rate), run in found.items() if (name, rate) in wanted]
        todo = [job for job in jobs if key(job) not in found]
        if not todo:
            print(f"all {len(jobs)} runs are in {self.file}; with another --out they are made again")
            return
        with multiprocessing.get_context("spawn").Pool(processes) as pool, Progress() as progress:
            bar = progress.add_task(self.data["plan"], total=len(todo))
            for run in pool.imap_unordered(one, todo):
                self.data["runs"].append(run)
                self.save()
                progress.advance(bar)

    def save(self) -> None:
        """A line for each run."""
        self.data["runs"].sort(key=lambda run: (run["seed"], run["name"], run["rate"]))
        lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in self.data["runs"])
        head = json.dumps({name: value for name, value in self.data.items() if name != "runs"})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file, f'{head[:-1]}, "runs": [\n{lines}\n]}}\n')


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=480)
    parser.add_argument("--points", type=int, default=16, help="how often a run is measured")
    parser.add_argument("--rates", action="store_true", help="search each method's learning rate instead")
    parser.add_argument("--scales", action="store_true", help="measure the adapters turned down, too")
    parser.add_argument("--among", type=float, nargs="+", default=RATES, help="the rates of that search")
    parser.add_argument(
        "--like",
        default="drift",
        help="the method whose rate those have that no search has had (drift); NAME+WHAT has that of NAME",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    name = args.plan.stem
    searched = args.out / f"{name}-rates.json"
    try:
        configs = planned(args.plan, args.iterations)
        file = searched if args.rates else args.out / f"{name}{'-scaled' * args.scales}.json"
        book = Book(file, name, args.iterations, next(iter(configs)))
        base_model()
        if args.rates:
            book.make(jobs_of(configs, dict.fromkeys(configs, args.among), TUNING, args.points), args.jobs)
            first = [run for run in book.data["runs"] if run["seed"] in TUNING]  # which all rates have had
            best = {method: rates[:2] for method, rates in ranked_rates(first).items()}
            book.make(jobs_of(configs, best, AGAIN, args.points), args.jobs)
            return
        tuned = best_rates(searched if searched.is_file() else args.out / "methods-rates.json")
        usual = tuned.get(args.like, SETTINGS["optimizer.learning_rate"])
        rates = {method: [tuned.get(method.partition("+")[0], usual)] for method in configs}
        scales = SCALES if args.scales else ()
        book.make(jobs_of(configs, rates, range(args.seeds), args.points, scales), args.jobs, only=True)
        book.save()
    except InputError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "stopped; the same command goes on\n")


if __name__ == "__main__":
    main()
