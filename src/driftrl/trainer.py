"""The whole loop, top to bottom, in the paper's order (DRIFT, arXiv 2601.12401).

It receives built objects (`driftrl.build` makes them) and knows no configuration, file format or model.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from driftrl import checkpoint, noise_check, one_pass, prompts
from driftrl.advantages import AdvantageRule, History, advantages_of, constant_rewards
from driftrl.batches import BatchSize, in_batches
from driftrl.checkpoint import Position
from driftrl.checks import InputError, NotFiniteError, RunFailedError
from driftrl.conditioning import NoiseCost, noise_cost
from driftrl.distributed import ALONE, Team, in_parts
from driftrl.diversity.functional import pairwise_distances
from driftrl.embeddings import Embeddings
from driftrl.memory import Memory
from driftrl.mixture import Part, columns, mixed
from driftrl.noise import generator
from driftrl.objectives.gate import Anchor, gate, reward_disagreement
from driftrl.pathwise import Followed, Worth, gradient_of_images, worth
from driftrl.rollout import PromptNoise, Window, rollout
from driftrl.schedule import kept_share
from driftrl.scoring import Scoring
from driftrl.selection import select
from driftrl.shaping import (
    DiversityWarning,
    Shaping,
    constant_diversity,
    diversity_bonus,
    group_diversity,
    shape_at_advantage,
    shape_at_reward,
    shaping_weight,
)
from driftrl.types import Conditioning, Encoder, Policy, Reward, Rollout, UpdateStats
from driftrl.update import Objective, update


@dataclass(frozen=True)
class Method:
    """The settings that make DRIFT, or one of its competitors."""

    candidates: int
    keep: int
    strategy: str
    prompt_noise: PromptNoise
    advantage: AdvantageRule
    shaping: Shaping
    anchor: Anchor
    rewards: tuple[Part, ...] = ()
    """How several rewards become one; empty where there is only one."""
    window: Window | None = None
    """The steps that have noise; None for all."""
    same_latent: bool = False
    """Whether all candidates of a prompt begin at one initial latent."""


@dataclass(frozen=True)
class Iteration:
    """What one iteration produced, for whoever watches."""

    number: int
    metrics: dict[str, float]
    """Deterministic figures: they go to metrics.jsonl (docs/metrics.md)."""
    seconds: dict[str, float]
    """How long each phase took."""
    prompts: list[str]
    images: Tensor
    """[P, N, 3, height, width] in 0..1: all candidates; of several processes, those of this one's prompts."""
    rewards: Tensor
    """[P, N]: of several rewards what they became together."""
    chosen: Tensor
    """[P, G]: the candidates that were learned from."""


class RewardWarning(UserWarning):
    """All kept candidates of a prompt have the same reward, so they teach nothing (design 2.6)."""


class NotFiniteWarning(UserWarning):
    """An iteration's update was skipped, for something in it was NaN or infinite."""


class TrainingLoop:
    """Reinforcement fine-tuning that keeps variety."""

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        encoder: Encoder,
        prompt_set: tuple[str, ...],
        method: Method,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        checkpoints: Path,
        *,
        seed: int = 0,
        prompts_per_iteration: int = 8,
        rollout_batch: int = 128,
        checkpoint_every: int = 10,
        keep_last: int = 1000,
        keep_every: int | None = None,
        max_failures: int = 3,
        configuration: dict[str, Any] | None = None,
        judges: tuple[Reward, ...] = (),
        team: Team = ALONE,
        overlap_reward: bool = False,
        similarity: Reward | None = None,
        in_one_pass: bool = False,
        schedule: Callable[[int], float] | None = None,
        ema_decay: float | None = None,
        gradient_batch: int = 32,
    ) -> None:
        """Take over built objects; ``checkpoints`` is the folder that checkpoints go to, each with
        ``configuration``. ``judges`` are rewards whose disagreement with ``reward`` decides whom the divergence
        holds (`driftrl.objectives.gate`); with none it holds every sample.
        The processes of ``team`` share the prompts of each iteration out; the first one writes checkpoints. With
        ``overlap_reward`` each finished batch of images is scored while the next one is drawn.
        ``similarity`` of image and prompt shows whether the noise on the prompt is too strong; None does not look.
        ``in_one_pass`` takes gradients while the candidates are drawn (`driftrl.one_pass`), with batches of the update's
        size. ``schedule`` is the share of the optimizer's learning rate that an iteration has. With ``ema_decay``
        checkpoints hand out a moving average of the weights (`driftrl.schedule`). The gradient of the reward, for losses that
        follow it, is taken of ``gradient_batch`` images at once.
        """
        self.policy, self.reward, self.encoder, self.prompt_set = policy, reward, encoder, prompt_set
        self.method, self.objective, self.optimizer, self.checkpoints = (
            method,
            objective,
            optimizer,
            checkpoints,
        )
        self.schedule, self.ema_decay = schedule, ema_decay
        self.learning_rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.seed, self.prompts_per_iteration = seed, prompts_per_iteration
        self._move_window(0)
        self.overlap_reward, self.in_one_pass = overlap_reward, in_one_pass
        # Processes that hold parts of the weights call the network equally often, so none may try again on its own.
        self.in_parts = any(map(in_parts, policy.parameters()))
        self.rollout_batch = BatchSize(rollout_batch, "sampling.batch_size", self.in_parts)
        self.update_batch = BatchSize(objective.batch_size, "optimizer.batch_size", self.in_parts)
        self.encoder_batch = BatchSize(
            prompts_per_iteration * method.keep, "shaping.encoder: images at once,"
        )
        self.gradient_batch = BatchSize(gradient_batch, "objective.loss: images at once,")
        self.checkpoint_every, self.keep_last, self.keep_every = checkpoint_every, keep_last, keep_every
        self.max_failures, self.configuration, self.judges, self.team, self.similarity = (
            max_failures,
            configuration,
            judges,
            team,
            similarity if method.prompt_noise.eta > 0 else None,
        )
        self._said: set[type[Warning]] = set()
        self.position = Position(0)
        self.memory = Memory.empty(
            method.advantage,
            len(prompt_set),
            policy,
            own_behavior=objective.denoising is not None,
            averaged=ema_decay is not None,
            anchored=objective.anchor_kept > 0,
            ratio=None if method.shaping.target is None else method.shaping.ratio,
        )
        self._saved: int | None = None
        self.on_sampled: Callable[[int], None] | None = None
        """Called with the number of images finished after each rollout batch."""
        self.conditioning = Embeddings(policy, prompt_set)

    def _move_window(self, number: int) -> None:
        """To where it is in iteration ``number``, from 0, if there is one."""
        if self.method.window is not None:
            self.policy.add_noise_in(None)
            noisy = int(self.policy.scored.sum())
            self.policy.add_noise_in(self.method.window.at(number, noisy, self.seed))

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint."""
        self.position = checkpoint.load(path, self.policy, self.optimizer)
        self.memory = self.memory.restored(checkpoint.load_memory(path), self.policy)
        self.restored_sizes(checkpoint.batch_sizes(path))
        self._saved = self.position.iteration

    @property
    def replays(self) -> bool:
        """Whether the update goes the way of the drawn latents again."""
        return not self.in_one_pass and self.objective.denoising is None

    def sizes(self) -> Tensor:
        """Batch sizes of rollout and update in each process: int64 [processes, 2]."""
        return self.team.gather(torch.tensor([[self.rollout_batch.now, self.update_batch.now]]))

    def restored_sizes(self, found: list[list[int]]) -> None:
        """Take over what `sizes` gave, for rounding depends on them; if there were other processes, their smallest."""
        if found:
            own = (
                found[self.team.rank] if len(found) == self.team.size else map(min, zip(*found, strict=True))
            )
            self.rollout_batch.now, self.update_batch.now = own

    def run(
        self, iterations: int, watch: Callable[[Iteration], Any], stop: Callable[[], bool] = bool
    ) -> None:
        """Train until ``iterations`` are done, or until ``stop()`` says so; leave a checkpoint however it ends.

        Raises:
            RunFailedError: if the reward cannot be had, or too many iterations in a row were not finite.
        """
        if self._saved is None:
            self.save()
        try:
            while self.position.iteration < iterations and not stop():
                self._show(self.attempt(), watch)
                if self.position.failures >= self.max_failures:
                    raise RunFailedError(
                        f"{self.position.failures} iterations in a row were not finite, up to iteration "
                        f"{self.position.iteration}; a lower optimizer.learning_rate, or model.dtype float32, may help"
                    )
                if self.position.iteration % self.checkpoint_every == 0:
                    self.save()
        except (RunFailedError, InputError):
            self.save_if_new()
            raise
        self.save_if_new()

    def _show(self, iteration: Iteration, watch: Callable[[Iteration], Any]) -> None:
        """What ``watch`` raises is no reason to lose the iteration; of several processes the others are at work, so nothing is
        written.
        """
        try:
            watch(iteration)
        except Exception:
            if self.team.size == 1:
                self.save_if_new()
            raise

    def attempt(self) -> Iteration:
        """One iteration, or, where something in it is not finite, a skipped one: a warning and no update."""
        try:
            return self.iterate()
        except NotFiniteError as error:
            number = self.position.iteration + 1
            warnings.warn(
                f"iteration {number} was skipped: {error}; that step went into no weight",
                NotFiniteWarning,
                stacklevel=2,
            )
            self.position = Position(number, self.position.failures + 1)
            metrics = {"iteration": number, "reward/mean": math.nan, "diversity/kept_mean": math.nan,
                       "warning/skipped": 1}  # fmt: skip
            nothing = torch.empty(0)
            return Iteration(number, metrics, {}, [], nothing, nothing, nothing)

    def iterate(self) -> Iteration:
        """One iteration: sample, score, select, compare, shape, learn.

        A process samples, embeds and replays its own prompts. What is gathered is small: rewards and distances; so what
        follows from them is computed for all prompts by every process, and comes out the same.
        """
        method, number, team = self.method, self.position.iteration, self.team
        clock = _Clock()

        which = prompts.draw(len(self.prompt_set), self.prompts_per_iteration, self.seed, number)
        texts = [self.prompt_set[i] for i in which]
        # A prompt that comes twice is no copy of itself.
        first = [times * method.candidates for times in prompts.earlier(which)]
        mine = team.share(len(which))
        conditioning = self.conditioning.rows(which[mine])

        sampled, (scores, *opinions), followed = self._drawn(
            conditioning, texts[mine], which[mine], first[mine], number, clock
        )
        parts = columns(scores, method.rewards)
        for name, part in parts.items():
            _demand_finite(f"reward ({name})", part, texts)
        rewards = mixed(scores, method.rewards)
        _demand_finite("reward", rewards, texts)
        disagreement = self._disagreement(rewards, opinions, texts)
        memory = self.memory.with_rewards(which, rewards)
        clock.lap("reward")
        cost = self._noise_cost(sampled.images, conditioning, which[mine], first[mine], number)
        if cost is not None:
            clock.lap("noise_check")

        chosen = select(
            rewards, method.keep, method.strategy, generator(self.seed, number, 0, 0, "selection")
        )
        kept = sampled.keep(chosen[mine])
        kept_rewards = rewards.gather(1, chosen)

        drawn = sampled.images
        del sampled  # the trajectories of those that were not chosen, before gradients need the memory

        distances, varied = self._varieties(kept.images, drawn, texts[mine], chosen)
        diversity = group_diversity(distances)
        bonus = diversity_bonus(
            distances if kept.clean is None else team.gather(pairwise_distances(kept.clean.transpose(1, 2))),
            method.shaping,
        )
        kept = kept.path()
        clock.lap("diversity")

        memory, ratio, share = memory.with_diversity(which, varied, method.shaping)
        advantages, weight = self._advantages(rewards, kept_rewards, bonus, memory.rows(which), ratio)
        held = None if disagreement is None else gate(disagreement.gather(1, chosen), method.anchor.share)
        earned = scores, rewards, chosen, bonus
        pull = self._pull(kept, drawn, texts[mine], mine, earned, memory.rows(which), ratio, followed)
        stats = self._learn(kept, advantages, conditioning, texts, held, memory, pull)
        self.memory = memory.after(
            stats.kl,
            method.anchor,
            self.policy,
            self.objective.kept(number),
            kept_share(number, self.ema_decay or 0.0),
            self.objective.anchor_kept,
        )
        clock.lap("update")

        self.position = Position(number + 1)
        metrics = {
            "iteration": number + 1,
            "reward/mean": float(rewards.mean()),
            **{f"reward/{name}/mean": float(part.mean()) for name, part in parts.items()},
            "reward/std_within_prompt": float(rewards.std(1, correction=0).mean()),
            "reward/kept_mean": float(kept_rewards.mean()),
            "reward/kept_std": float(kept_rewards.std(1, correction=0).mean()),
            "diversity/kept_mean": float(diversity.mean()),
            "diversity/kept_std": float(diversity.std(1, correction=0).mean()),
            "advantage/abs_mean": float(advantages.abs().mean()),
            "advantage/shaping_weight": weight,
            **(
                {}
                if ratio is None or share is None
                else {"shaping/ratio": float(ratio.mean()), "shaping/left": float(share.mean())}
            ),
            "loss": stats.loss,
            "loss/surrogate": stats.surrogate,
            "loss/kl": stats.kl,
            "policy/approx_kl": stats.approx_kl,
            "policy/clip_fraction": stats.clip_fraction,
            "policy/ratio_deviation": stats.ratio_deviation,
            "policy/rescored_by": stats.rescored_by,
            "policy/grad_norm": stats.grad_norm,
            "policy/learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            "policy/pairs": stats.pairs,
            "reference/held": 1.0 if held is None else float(held.mean()),
            "reference/moved": int(self.memory.reference is not memory.reference),
            "warning/constant_reward_groups": int(constant_rewards(kept_rewards).sum()),
            "warning/skipped": 0,
            "warning/constant_diversity_groups": int(constant_diversity(diversity).sum()),
            **noise_check.metrics(cost),
        }
        constant = metrics["warning/constant_reward_groups"]
        # Their gradient teaches where it is not their own spread that divides.
        if constant and (self.objective.pathwise is None or method.advantage.scale == "selected"):
            self._say(
                RewardWarning,
                f"in iteration {number + 1} the kept rewards of {constant} of {len(texts)} prompts are all equal: "
                "their reward teaches nothing; a finer one or more candidates would help",
            )
        metrics = {k: v if math.isfinite(v) else float("nan") for k, v in metrics.items()}
        return Iteration(number + 1, metrics, clock.seconds, texts, drawn, rewards, chosen)

    def save(self) -> Path:
        """Write a checkpoint now, or wait until the first process has."""
        path, sizes = self.checkpoints / checkpoint.name_of(self.position), self.sizes()
        leads = self.team.leads
        tensors = checkpoint.gathered(self.policy, self.optimizer, leads) if self.in_parts or leads else {}
        if leads:
            checkpoint.save(
                self.checkpoints,
                self.policy,
                self.optimizer,
                self.position,
                self.configuration,
                self.memory.tensors(),
                sizes.tolist(),
                tensors,
                lambda: self.memory.handed_out(self.policy),
            )
            checkpoint.prune(self.checkpoints, self.keep_last, self.keep_every)
        self.team.wait()
        self._saved = self.position.iteration
        return path

    def save_if_new(self) -> None:
        """Write a checkpoint, unless there is one of this iteration."""
        if self._saved != self.position.iteration:
            self.save()

    @property
    def follows_at_once(self) -> bool:
        """Whether a pathwise loss has the gradient of its reward from where images are first decoded: where there is a single reward,
        nothing else is followed, and no image goes.
        """
        method = self.method
        alone = not method.shaping.on and not method.rewards and method.keep == method.candidates
        return self.objective.pathwise is not None and alone and not self.overlap_reward

    def _followed(self, texts: list[str]) -> Followed | None:
        """What takes that gradient, for this process's candidates of ``texts``."""
        if not self.follows_at_once:
            return None
        return Followed(self.policy, self.reward, texts, self.gradient_batch)

    def _drawn(
        self, conditioning: Conditioning, texts: list[str], which: list[int], first: list[int], number: int, clock: _Clock,
    ) -> tuple[Rollout, list[Tensor], Followed | None]:  # fmt: skip
        """This process's candidates; what the reward and each judge gives those of all processes, [P, N] or [P, N, R]; and the reward's
        gradients, where they were taken on the way.
        """
        flat = [text for text in texts for _ in range(self.method.candidates)]
        followed = self._followed(flat)
        scoring = Scoring(self.judges if followed else (self.reward, *self.judges), flat, self.overlap_reward)
        # A latent or reward that is not finite, or cannot be had, concerns all.
        with self.team.together(), scoring:
            sampled = self._sample(conditioning, which, first, number, scoring, followed)
            _demand_finite("latent", sampled.latents, texts)
            clock.lap("rollout")
            asked = scoring.scores(sampled.images.flatten(0, 1))
            found = asked if followed is None else [followed.scores, *asked]
            found = [self._by_prompt(scores) for scores in found]
        return sampled, [self.team.gather(scores) for scores in found], followed

    def _sample(
        self,
        conditioning: Conditioning,
        which: list[int],
        first: list[int],
        number: int,
        scoring: Scoring,
        followed: Followed | None = None,
    ) -> Rollout:
        keys = [(self.seed, number, prompt) for prompt in which]
        method = self.method
        noise, count = method.prompt_noise, method.candidates
        stepwise = method.shaping.potential == "stepwise"
        batch, score_gradients = self.rollout_batch, None
        self._move_window(number)
        if self.in_one_pass:
            samples = self.prompts_per_iteration * method.keep
            batch, score_gradients = (
                self.update_batch,
                one_pass.score_gradients(self.policy.scored, self.objective, samples),
            )
        with self.memory.drawing(self.policy):
            return rollout(
                self.policy, conditioning, keys, count, batch, noise, self.on_sampled, stepwise, scoring.add,
                score_gradients, first, self.replays, self.objective.asks_for_means, method.same_latent,
                None if followed is None else followed.decode,
            )  # fmt: skip

    def _learn(
        self, kept: Rollout, advantages: Tensor, conditioning: Conditioning, texts: list[str], held: Tensor | None,
        memory: Memory, pull: Tensor | None,
    ) -> UpdateStats:  # fmt: skip
        """The update: by replay, or from gradients that the rollout has taken."""
        if self.schedule is not None:
            share = self.schedule(self.position.iteration)
            for group, rate in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
                group["lr"] = share * rate
        team, key = self.team, (self.seed, self.position.iteration)
        if self.in_one_pass:
            return one_pass.update_from(
                kept, self.policy, self.optimizer, advantages, self.objective, texts, team
            )
        return update(
            self.policy, self.optimizer, kept, advantages, conditioning, self.objective, key,
            self.method.prompt_noise, texts, held, lambda: memory.reference_of(self.policy), team, self.update_batch,
            lambda: memory.drawing(self.policy), lambda: memory.anchoring(self.policy), pull,
        )  # fmt: skip

    def _pull(
        self, kept: Rollout, drawn: Tensor, texts: list[str], mine: slice, earned: tuple[Tensor, Tensor, Tensor, Tensor],
        history: History | None, ratio: Tensor | None, followed: Followed | None,
    ) -> Tensor | None:  # fmt: skip
        """The gradient of what is wanted of this process's kept images, in their clean latents [p, G, C, H, W]; None where no loss
        follows it.

        Args:
            kept: of the p prompts ``texts``, which are those at ``mine`` of all.
            drawn: [p, N, 3, H, W], the images of all their candidates.
            texts: see there.
            mine: see there.
            earned: of all prompts, scores [P, N] or [P, N, R], rewards [P, N], chosen [P, G] and bonus [P, G].
            history: the prompts' past, where it counts.
            ratio: lambda where each group has its own, [P].
            followed: what was found while the candidates were decoded.

        Raises:
            NotFiniteError: if it is not finite.
        """
        if self.objective.pathwise is None:
            return None
        method, chosen = self.method, earned[2][mine]
        weigh = worth(*earned, method.advantage, method.shaping, method.rewards, history, ratio)
        weigh = Worth(*(part[mine] for part in weigh))
        with self.team.together():
            if followed is not None:
                found = followed.weighed(chosen, weigh)
            else:
                images = drawn[torch.arange(len(chosen), device=chosen.device)[:, None], chosen]
                found = gradient_of_images(
                    kept.latents[:, :, -1], images, texts, self.policy, self.reward, self.encoder, method.shaping, weigh,
                    self.gradient_batch,
                )  # fmt: skip
            _demand_finite("gradient of reward and diversity", found[:, :, None], texts)
        return found

    def _varieties(
        self, kept: Tensor, drawn: Tensor, texts: list[str], chosen: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Distances [P, G, G] between the kept images of each group, of all processes; and, where a share of it is to be kept, how
        varied each prompt is, [P]: all that was drawn, for a selection makes images alike.

        Args:
            kept: [p, G, 3, H, W], of this process's prompts.
            drawn: [p, N, 3, H, W].
            texts: p prompts.
            chosen: [P, G], which of the N were kept.
        """
        every = self.method.shaping.target is not None
        with self.team.together():
            distances = self._distances(drawn if every else kept, texts)
        distances = self.team.gather(distances)
        if not every:
            return distances, None
        rows = distances.gather(1, chosen[:, :, None].expand(-1, -1, distances.shape[2]))
        among = rows.gather(2, chosen[:, None].expand(-1, chosen.shape[1], -1))
        return among, group_diversity(distances).mean(1)

    def _distances(self, images: Tensor, texts: list[str]) -> Tensor:
        """Cosine distances [P, G, G] between the images [P, G, 3, H, W] of each group.

        Raises:
            NotFiniteError: if an image has no features, or such as are not finite.
        """
        flat = images.flatten(0, 1)
        features = in_batches(self.encoder_batch, len(flat), lambda rows: self.encoder(flat[rows]))
        features = features.unflatten(0, images.shape[:2])
        wrong = ~(torch.isfinite(features).all(-1) & (features != 0).any(-1))
        if bool(wrong.any()):
            prompt, candidate = wrong.nonzero()[0].tolist()
            raise NotFiniteError(
                f"the encoder's features are all 0, or not finite, for {texts[prompt]!r}, "
                f"{'kept candidate' if self.method.shaping.target is None else 'candidate'} {candidate}"
            )
        return pairwise_distances(features.to(self.policy.device))

    def _advantages(
        self, rewards: Tensor, kept: Tensor, bonus: Tensor, history: History | None, ratio: Tensor | None
    ) -> tuple[Tensor, float]:
        """Of the kept candidates, shaped: [P, G] or [P, G, T], from all rewards [P, N], those kept, the bonus [P, G], and lambda where
        each group has its own, [P]; and how much shaping weighs in them (`shaping_weight`).
        """
        rule, shaping = self.method.advantage, self.method.shaping
        plain = advantages_of(kept, rule, rewards, history)
        with self._saying_once(DiversityWarning):
            rewarded = shape_at_reward(kept, bonus, shaping)
            # Candidates that were dropped have no diversity, so of shaped rewards only the kept ones' spread is known.
            advantages = plain if rewarded is kept else advantages_of(rewarded, rule, rewarded, history)
            shaped = shape_at_advantage(advantages, bonus, shaping, self.policy.scored, ratio)
        return shaped, shaping_weight(plain, shaped, self.policy.scored)

    def _by_prompt(self, scores: Tensor) -> Tensor:
        """Scores [P * N, ...] as [P, N, ...]."""
        return scores.unflatten(0, (-1, self.method.candidates)).to(self.policy.device)

    def _noise_cost(
        self, images: Tensor, conditioning: Conditioning, which: list[int], first: list[int], number: int
    ) -> NoiseCost | None:
        """What the noise on the prompt costs, over the prompts of all processes; None where it is not time to look.

        Args:
            images: [p, N, 3, H, W], of this process's prompts.
            conditioning: p rows.
            which: p places in the prompt set.
            first: p numbers of the first candidate.
            number: of the iteration, from 0.
        """
        if self.similarity is None or number % noise_check.CHECKED_EVERY:
            return None
        keys = [(self.seed, number, prompt) for prompt in which]
        count = noise_check.candidates_each(self.prompts_per_iteration)
        with self.team.together(), self.memory.drawing(self.policy):
            found = noise_check.matches(
                self.policy, self.similarity, images, conditioning, keys, self.prompt_set, count, self.rollout_batch,
                first, self.method.same_latent,
            )  # fmt: skip
        cost = noise_cost(*self.team.gather(found).unbind(1))
        if cost.falls:
            self._say(
                noise_check.PromptNoiseWarning,
                f"in iteration {number + 1} the noise on the prompt takes {cost.lost:.0%} of the prompt-image "
                f"similarity that a prompt gives: {cost.without:.3g} without it, {cost.similarity:.3g} with it; "
                "a lower prompt_noise.eta would help",
            )
        return cost

    def _say(self, kind: type[Warning], message: str) -> None:
        """Warn, once in a run: metrics.jsonl has every time."""
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(message, kind, stacklevel=3)

    @contextmanager
    def _saying_once(self, kind: type[Warning]) -> Iterator[None]:
        """Within this context, warnings of ``kind`` are as by `_say`, and others as ever."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for one in caught:
            if one.category is kind:
                self._say(kind, str(one.message))
            else:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)

    def _disagreement(self, rewards: Tensor, opinions: list[Tensor], texts: list[str]) -> Tensor | None:
        """How much higher ``rewards`` [P, N] rank each candidate than the judges do, if there are any."""
        if not opinions:
            return None
        others = [mixed(opinion, self.method.rewards) for opinion in opinions]
        for other in others:
            _demand_finite("judge's reward", other, texts)
        return reward_disagreement(rewards, others)


def _demand_finite(what: str, values: Tensor, texts: list[str]) -> None:
    """Refuse values [P, N, ...] that are not finite, naming the prompt and, of latents, the denoising step."""
    wrong = ~torch.isfinite(values)
    if bool(wrong.any()):
        prompt, candidate, *rest = wrong.nonzero()[0].tolist()
        step = (
            f", denoising step {rest[0]}" if rest and values.shape[2] > 1 else ""
        )  # else the last latents alone
        raise NotFiniteError(f"a {what} is not finite for {texts[prompt]!r}, candidate {candidate}{step}")


class _Clock:
    """Splits an iteration's time into phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
