"""driftrl on the work of `work.py`, as `driftrl train` does it; with --floor the bare passes and nothing else.

Both take gradients while they draw, as an update of one step allows (`driftrl.one_pass`); with --replay they replay the
candidates, as an update of several steps must. With --draft the gradient of the reward goes through the last ``--trained`` steps.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from work import PROMPTS, Clock, parse, report, reward

from driftrl.build import build_loop, build_policy
from driftrl.config import TrainConfig, parse_config


def colour(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """The reward of `work.py`, as driftrl calls it."""
    return reward(images)


def configuration(args, folder: Path) -> TrainConfig:
    """The work as a configuration: GRPO on all candidates."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS[: args.prompts]))
    return parse_config(
        {
            "model": {"path": args.model},
            "adapter": {"rank": args.rank, "alpha": float(args.rank)},
            "prompts": {"set": str(folder / "prompts.txt"), "per_iteration": args.prompts},
            "sampling": {"steps": args.steps, "guidance_scale": args.guidance, "candidates": args.candidates,
                         "batch_size": args.rollout_batch},
            "reward": "ours:colour",
            "selection": {"strategy": "all", "keep": args.candidates},
            "prompt_noise": {"eta": 0.0},
            "shaping": {"ratio": 0.0},
            "objective": {"loss": "draft", "draft_steps": args.trained} if args.draft else {"timesteps": 1.0},
            "optimizer": {"updates": 1, "batch_size": args.update_batch, "learning_rate": 1e-4,
                          "one_pass": not (args.replay or args.draft)},
        }
    )  # fmt: skip


def train(args, config: TrainConfig, folder: Path) -> None:
    """The training loop, logs and checkpoints apart."""
    loop = build_loop(config, folder)
    clock = Clock()
    loop.policy.decode = clock.timed("decode", loop.policy.decode)
    pairs = args.trained if args.draft else int(loop.policy.scored.sum())
    if pairs != args.trained:
        raise SystemExit(
            f"driftrl trains on {pairs} of the steps, not on {args.trained}: pass --trained {pairs}"
        )
    laps = []
    for _ in range(args.iterations + 1):
        clock.lap()
        start = time.perf_counter()
        done = loop.iterate()
        total = time.perf_counter() - start
        decode = clock.lap()["decode"]
        seconds = done.seconds
        laps.append({"total": total, "rollout": seconds["rollout"] - decode, "decode": decode, "reward": seconds["reward"],
                     "update": seconds["update"], "diversity": seconds["diversity"]})  # fmt: skip
    report(laps[1:], trained=sum(p.numel() for p in loop.policy.parameters()), torch=torch.__version__)


def floor(args, config: TrainConfig) -> None:
    """The forward passes of the rollout, the decoding, and the forward and backward passes of the update.

    Through the layers that the training loop uses, which take one set of latents for both branches of guidance.
    """
    policy = build_policy(config)
    network = policy.fast
    if network is None:
        raise SystemExit("the floor is measured through driftrl's own form of the network: this one has none")
    images = args.prompts * args.candidates
    conditioning = policy.encode(list(PROMPTS[: args.prompts]))
    every = conditioning.rows(torch.arange(images) % args.prompts)
    rows = every.embeds
    if args.guidance != 1:
        rows = torch.cat([every.null_embeds.expand_as(rows), rows])
    copies = len(rows) // images

    def inputs(batch: int):
        return (
            torch.randn(batch, *policy.latent_shape),
            torch.full((batch,), 500),
            rows[: copies * batch],
        )

    parameters = policy.parameters()
    together = 0 if args.replay else args.trained
    drawn = args.rollout_batch if args.replay else args.update_batch
    laps = []
    for _ in range(args.iterations + 1):
        start = time.perf_counter()
        for _ in range(images // drawn):
            x, t, e = inputs(drawn)
            for _ in range(together):
                network(x, t, e).square().mean().backward()
            with torch.no_grad():
                for _ in range(args.steps - together):
                    network(x, t, e)
        sampled = time.perf_counter()
        latents = torch.randn(images, *policy.latent_shape)
        policy.decode(latents)
        decoded = time.perf_counter()
        x, t, e = inputs(args.update_batch)
        for _ in range(images * (args.trained - together) // args.update_batch):
            network(x, t, e).square().mean().backward()
        end = time.perf_counter()
        for parameter in parameters:
            parameter.grad = None
        laps.append(
            {
                "total": end - start,
                "rollout": sampled - start,
                "decode": decoded - sampled,
                "update": end - decoded,
            }
        )
    report(laps[1:], trained=sum(p.numel() for p in parameters), torch=torch.__version__)


def main() -> None:
    """Do one or the other."""
    bare, replay, draft = (option in sys.argv for option in ("--floor", "--replay", "--draft"))
    sys.argv = [a for a in sys.argv if a not in ("--floor", "--replay", "--draft")]
    args = parse(__doc__)
    args.replay, args.draft = replay, draft
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(args, Path(folder))
        if bare:
            floor(args, config)
        else:
            train(args, config, Path(folder))


if __name__ == "__main__":
    main()
