"""What a run will take: counts, bytes and seconds by arithmetic; `driftrl.probe` measures what it multiplies.

Symbols as in `driftrl.types`: P prompts, N candidates of each, G of them kept, T denoising steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

FLOAT = 4
"""Bytes of what is stored, trained and optimised: float32, whatever the network computes in."""


@dataclass(frozen=True)
class Plan:
    """The settings of one iteration that decide what it takes."""

    prompts: int
    candidates: int
    keep: int
    steps: int
    scored: int
    """Denoising steps that may be learned from: those with a density, where one is asked for."""
    trained: float
    """Share of them that each sample is trained on."""
    branches: int
    """Rows of the network for each sample: 2 with classifier-free guidance."""
    rollout_batch: int
    updates: int
    epochs: int
    update_batch: int
    reference: int
    """How many other policies the update asks of each pair: the reference (KL), the one that drew (nft, awm, dgpo), and what
    groups are weighed by (dgpo: the policy itself, and the reference)."""
    rescored: bool
    """Whether samples are scored again before the update (half precision)."""
    judges: int
    """Further rewards that every image is scored by."""
    backward: int = 0
    """Denoising steps whose gradients are taken while images are drawn (`driftrl.one_pass`); 0 replays them."""
    path: bool = True
    """Whether every latent on the way to an image is kept, or the last one alone."""
    means: bool = False
    """Whether the mean of every step is kept too."""
    grouped: bool = False
    """Whether the kept images of a prompt are learned from together (dgpo): then none of them is in another optimiser step."""
    spared: bool = False
    """Whether the first optimiser step does without asking the one that drew, which it then still is."""
    all_embedded: bool = False
    """Whether the encoder sees all candidates, of which a share of diversity is to be kept, or those that are learned from alone."""
    carried: int = 0
    """Denoising steps that are asked again to carry the gradient of the reward back (adjoint, draft), for every kept image."""
    adjoints: int = 0
    """Latents that are kept of each for the update: of every step that is learned from the adjoint, and the base model's mean (adjoint)."""
    at_once: bool = False
    """Whether the gradient of the reward is taken where images are first decoded and scored, and not of the kept ones again."""

    @property
    def images(self) -> int:
        """Images that are drawn: P x N."""
        return self.prompts * self.candidates

    @property
    def kept(self) -> int:
        """Images that are learned from: P x G."""
        return self.prompts * self.keep

    @property
    def pairs(self) -> int:
        """(sample, timestep) pairs of one pass over the kept images."""
        return self.kept * max(1, round(self.trained * self.scored))

    @property
    def parts(self) -> list[int]:
        """Pairs of each optimiser step of one pass."""
        unit = self.keep if self.grouped else 1
        count = self.pairs // unit
        several = min(self.updates, count)
        return [unit * (count // several + (part < count % several)) for part in range(several)]


@dataclass(frozen=True)
class Calls:
    """Calls of the network in one iteration, by purpose, and optimiser steps."""

    rollout: int
    update: int
    """Forward and backward."""
    reference: int
    rescoring: int
    optimizer: int
    backward: int = 0
    """Those of the rollout that are backward too."""
    carried: int = 0
    """Those that carry a gradient back: forward and, but for the last step, backward."""

    @property
    def forward(self) -> int:
        """All calls of the network."""
        return self.rollout + self.update + self.reference + self.rescoring + self.carried


def batches(count: int, size: int) -> list[int]:
    """The sizes that ``count`` things are split into, ``size`` at a time.

    Example:
        >>> from driftrl.estimate import batches
        >>> batches(10, 4)
        [4, 4, 2]
    """
    whole, rest = divmod(count, size)
    return [size] * whole + ([rest] if rest else [])


def calls(plan: Plan) -> Calls:
    """How often one iteration calls the network.

    Without KL the update leaves out pairs of zero advantage; this is what it calls where there are none.
    """
    update = plan.epochs * sum(len(batches(part, plan.update_batch)) for part in plan.parts)
    drawn = len(batches(plan.images, plan.rollout_batch))
    if plan.backward:
        return Calls(drawn * plan.steps, 0, 0, 0, plan.epochs * len(plan.parts), drawn * plan.backward)
    return Calls(
        rollout=drawn * plan.steps,
        update=update,
        reference=update * plan.reference
        - (len(batches(plan.parts[0], plan.update_batch)) if plan.spared else 0),
        rescoring=update if plan.rescored else 0,
        optimizer=plan.epochs * len(plan.parts),
        carried=plan.carried * len(batches(plan.kept, plan.update_batch)),
    )


def adjoint_bytes(plan: Plan, latent: tuple[int, ...]) -> int:
    """Bytes of adjoints and means, and of the gradient in the clean latents, of latents [C, H, W]; 0 without any."""
    return FLOAT * plan.kept * (plan.adjoints + 1) * math.prod(latent) if plan.adjoints else 0


def picture_bytes(plan: Plan, image: tuple[int, ...]) -> int:
    """Bytes of the images [3, height, width] of all candidates."""
    return FLOAT * plan.images * math.prod(image)


def stored_bytes(
    plan: Plan,
    latent: tuple[int, ...],
    image: tuple[int, ...],
    noise: tuple[int, ...] = (),
    clean: int = 0,
    gradients: int = 0,
) -> int:
    """Bytes of an iteration's `driftrl.types.Rollout`.

    Args:
        plan: the iteration.
        latent: shape [C, H, W] of one latent.
        image: shape [3, height, width] of one image.
        noise: shape [L, D] of a candidate's prompt noise; () without.
        clean: features kept of each predicted clean latent; 0 without stepwise potentials.
        gradients: numbers of a candidate's gradient; 0 where they are not taken in one pass.
    """
    latents = plan.steps + 1 if plan.path else 1
    latents += plan.steps * plan.means * (1 + plan.rescored)  # asked again, beside those of the rollout
    path = latents * math.prod(latent) + (plan.steps + 1) * clean + plan.steps
    return FLOAT * plan.images * (path + math.prod(image) + (math.prod(noise) if noise else 0) + gradients)


@dataclass(frozen=True)
class Phases:
    """A figure for each phase of an iteration."""

    denoising: float
    decoding: float
    reward: float
    diversity: float
    update: float

    def items(self) -> list[tuple[str, float]]:
        """(phase, figure) in the order of an iteration."""
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


@dataclass(frozen=True)
class Costs:
    """What was measured: seconds of one piece of work, and bytes that come and go with each phase."""

    step: float
    """Seconds of one denoising step of one image."""
    decode: float
    """Of one image; and so are the next two."""
    reward: float
    encode: float
    pair: float
    """Of one pair's share of the update: forward, backward, reference and rescoring."""
    optimizer: float
    """Of one optimiser step."""
    working: Phases
    """Bytes above what stays, with batches as large as the run's; the update's without its gradients."""
    backward: float = 0.0
    """Seconds of one denoising step of one image with its gradient; 0 where none is taken."""
    followed: float = 0.0
    """Of the gradient of one image's reward and diversity, through autoencoder, reward and encoder; 0 where none is taken."""


def seconds(plan: Plan, costs: Costs) -> Phases:
    """Seconds of each phase of one iteration."""
    return Phases(
        denoising=plan.images * (costs.step * (plan.steps - plan.backward) + costs.backward * plan.backward),
        decoding=(costs.followed if plan.at_once else costs.decode) * plan.images,
        reward=costs.reward * plan.images * (plan.judges + (not plan.at_once)),
        diversity=costs.encode * (plan.images if plan.all_embedded else plan.kept),
        update=(0 if plan.backward else costs.pair * plan.pairs * plan.epochs)
        + (costs.pair * plan.carried + (0.0 if plan.at_once else costs.followed)) * plan.kept
        + costs.optimizer * calls(plan).optimizer,
    )


def evaluation_seconds(plan: Plan, costs: Costs, images: int, steps: int | None = None) -> float:
    """Seconds to draw, score and embed ``images`` images, in ``steps`` denoising steps or as many as in training."""
    return images * ((steps or plan.steps) * costs.step + costs.decode + costs.reward + costs.encode)


@dataclass(frozen=True)
class Standing:
    """Bytes that stay for the whole run."""

    program: int
    """Python and its libraries; 0 on a GPU, whose figures are those of torch's allocator."""
    model: int
    """Network and autoencoder, and on a CPU the text encoders; LoRA weights included, and copies that a method keeps of them."""
    instruments: int
    """Reward and encoder, as far as their weights can be found."""
    conditioning: int
    """Embeddings of the prompt set, or, where they do not fit, of the prompts that are drawn (`driftrl.embeddings`)."""
    optimizer: int
    """Two moments of every trained weight."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.program + self.model + self.instruments + self.conditioning + self.optimizer


def peaks(
    plan: Plan, standing: Standing, stored: int, pictures: int, gradients: int, working: Phases
) -> Phases:
    """Most bytes in use during each phase of an iteration.

    Of the ``stored`` bytes of all candidates ``pictures`` are those of their images, which stay to the end of the
    iteration. The kept candidates are copied, their images only until diversity is known, and the others then go.
    """
    kept = plan.keep / plan.candidates
    return Phases(
        denoising=standing.total + stored + working.denoising,
        decoding=standing.total + stored + working.decoding,
        reward=standing.total + stored + working.reward,
        diversity=standing.total + stored * (1 + kept) + working.diversity,
        update=standing.total + pictures + (stored - pictures) * kept + gradients + working.update,
    )


LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Batch sizes to choose from."""


@dataclass(frozen=True)
class Need:
    """Bytes that a batch of n rows takes, above what stays: ``base + row * n``."""

    base: float
    row: float

    @staticmethod
    def through(small: tuple[int, float], large: tuple[int, float]) -> Need:
        """The line through two measurements (rows, bytes); where it would not rise, each row has its full share."""
        row = (large[1] - small[1]) / (large[0] - small[0]) if large[0] > small[0] else 0.0
        return Need(small[1] - row * small[0], row) if row > 0 else Need(0.0, large[1] / large[0])

    def most(self, room: float, useful: int) -> int | None:
        """The largest size of `LADDER`, at most the smallest that holds ``useful`` rows, that needs no more than
        ``room`` bytes; None if not even one row fits.

        Example:
            >>> from driftrl.estimate import Need
            >>> Need(base=10.0, row=2.0).most(room=50.0, useful=128), Need(10.0, 2.0).most(50.0, useful=5)
            (16, 6)
        """
        enough = next((size for size in LADDER if size >= useful), LADDER[-1])
        fitting = [size for size in LADDER if size <= enough and self.base + self.row * size <= room]
        return max(fitting, default=None)


def remedies(
    phase: str, plan: Plan, *, checkpointing: bool, slicing: bool, half: bool, full: bool
) -> list[str]:
    """Settings to change where ``phase`` does not fit, the cheapest first; none that is as small as it gets.

    Args:
        phase: one of `Phases`.
        plan: the iteration.
        checkpointing: whether `model.gradient_checkpointing` is on already.
        slicing: whether `model.vae_slicing` is.
        half: whether the network computes in half precision.
        full: whether every weight is trained.
    """
    found = []
    batch = min(plan.rollout_batch, plan.images)
    if phase == ("denoising" if plan.backward else "update"):  # which has the gradients
        if not checkpointing:
            found.append("model.gradient_checkpointing=true")
        if plan.update_batch > 1:
            found.append(
                f"optimizer.batch_size={max(1, min(plan.update_batch, plan.images if plan.backward else plan.pairs) // 2)}"
            )
    if phase == "decoding" and not slicing:
        found.append("model.vae_slicing=true")
    if phase in ("denoising", "decoding") and batch > 1:
        if not plan.backward:
            found.append(f"sampling.batch_size={batch // 2}")
        elif phase == "decoding":  # in one pass images are drawn in the update's batches
            found.append(f"optimizer.batch_size={batch // 2}")
    if phase != "update" and plan.prompts > 1:
        found.append(f"prompts.per_iteration={plan.prompts // 2}")
    if not half:
        found.append("model.dtype=bfloat16")
    if full:
        found.append("adapter.kind=lora")
    return found
