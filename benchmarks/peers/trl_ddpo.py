"""TRL's DDPOTrainer on the work of `work.py`."""

from __future__ import annotations

import time
import warnings

import torch
import transformers
from accelerate import PartialState

PartialState()  # its loggers want one before anything else

from peft import LoraConfig  # noqa: E402
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline  # noqa: E402
from work import PROMPTS, TARGETS, Clock, parse, report, reward  # noqa: E402

warnings.simplefilter("ignore")
# The names of CLIP's weights lost a prefix in transformers 5; without this the text encoder's are drawn anew.
transformers.CLIPTextModel.base_model_prefix = "text_model"


class Pipeline(DefaultDDPOStableDiffusionPipeline):
    """TRL's own, but for the rank of the adapter, which it fixes at 4."""

    rank = 4

    def get_trainable_layers(self):
        settings = LoraConfig(
            r=self.rank, lora_alpha=self.rank, init_lora_weights="gaussian", target_modules=TARGETS
        )
        self.sd_pipeline.unet.add_adapter(settings)
        return self.sd_pipeline.unet


def main() -> None:
    """Train, and report the time of each iteration."""
    args = parse(__doc__)
    images = args.prompts * args.candidates
    order = [PROMPTS[i % args.prompts] for i in range(images)]
    turn = iter(range(10**9))
    config = DDPOConfig(
        sample_num_steps=args.steps,
        sample_guidance_scale=args.guidance,
        sample_batch_size=args.rollout_batch,
        sample_num_batches_per_epoch=images // args.rollout_batch,
        train_batch_size=args.update_batch,
        train_gradient_accumulation_steps=images // args.update_batch,
        train_timestep_fraction=args.trained / args.steps + 1e-9,
        train_cfg=args.guidance > 1,
        train_learning_rate=1e-4,
        per_prompt_stat_tracking=True,
        per_prompt_stat_tracking_min_count=2,
        mixed_precision="no",
        num_epochs=1,
        save_freq=10**9,
    )
    Pipeline.rank = args.rank
    pipeline = Pipeline(args.model, use_lora=True)
    trainer = DDPOTrainer(
        config,
        lambda pictures, prompts, metadata: (reward(pictures), {}),
        lambda: (order[next(turn) % images], {}),
        pipeline,
    )
    pipeline.set_progress_bar_config(disable=True)
    clock = Clock()
    vae = pipeline.sd_pipeline.vae
    vae.decode = clock.timed("decode", vae.decode)
    trainer._generate_samples = clock.timed("rollout", trainer._generate_samples)
    trainer.compute_rewards = clock.timed("reward", trainer.compute_rewards)
    laps = []
    for iteration in range(args.iterations + 1):
        clock.lap()
        start = time.perf_counter()
        trainer.step(iteration + 1, 0)
        lap = {"total": time.perf_counter() - start, **clock.lap()}
        lap["rollout"] -= lap["decode"]
        lap["update"] = lap["total"] - lap["rollout"] - lap["decode"] - lap["reward"]
        laps.append(lap)
    trained = sum(p.numel() for p in pipeline.unet.parameters() if p.requires_grad)
    report(laps[1:], trained=trained, torch=torch.__version__)


if __name__ == "__main__":
    main()
