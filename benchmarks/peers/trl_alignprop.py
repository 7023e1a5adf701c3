"""TRL's AlignPropTrainer on the work of `work.py`: the gradient of the reward through the last ``--trained`` denoising steps."""

from __future__ import annotations

import time
import warnings

import torch
from trl_ddpo import Pipeline
from work import PROMPTS, Clock, parse, report, reward

from trl import AlignPropConfig, AlignPropTrainer  # isort: skip

warnings.simplefilter("ignore")


def main() -> None:
    """Train, and report the time of each iteration."""
    args = parse(__doc__)
    images = args.prompts * args.candidates
    order = [PROMPTS[i % args.prompts] for i in range(images)]
    turn = iter(range(10**9))
    config = AlignPropConfig(
        sample_num_steps=args.steps,
        sample_guidance_scale=args.guidance,
        train_batch_size=args.update_batch,
        train_gradient_accumulation_steps=images // args.update_batch,
        train_learning_rate=1e-4,
        truncated_backprop_rand=False,
        truncated_backprop_timestep=args.steps - args.trained,
        mixed_precision="no",
        num_epochs=1,
        save_freq=10**9,
    )
    Pipeline.rank = args.rank
    pipeline = Pipeline(args.model, use_lora=True)
    trainer = AlignPropTrainer(
        config,
        lambda pictures, prompts, metadata: (reward(pictures), {}),
        lambda: (order[next(turn) % images], {}),
        pipeline,
    )
    pipeline.set_progress_bar_config(disable=True)
    clock = Clock()
    trainer._generate_samples = clock.timed("rollout", trainer._generate_samples)
    trainer.compute_rewards = clock.timed("reward", trainer.compute_rewards)
    laps = []
    for iteration in range(args.iterations + 1):
        clock.lap()
        start = time.perf_counter()
        trainer.step(iteration + 1, 0)
        lap = {"total": time.perf_counter() - start, **clock.lap()}
        lap["update"] = lap["total"] - lap["rollout"] - lap["reward"]
        laps.append(lap)
    trained = sum(p.numel() for p in pipeline.unet.parameters() if p.requires_grad)
    report(laps[1:], trained=trained, torch=torch.__version__)


if __name__ == "__main__":
    main()
