"""The typed configuration of a run. Unknown keys are refused; every key says what it is for."""

from __future__ import annotations

import numbers
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, cast, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from driftrl.checks import InputError, nearest
from driftrl.objects import named

Positive = Annotated[int, Field(ge=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Size = Annotated[Positive | None, BeforeValidator(lambda value: None if value == "auto" else value)]
"""A batch size; null, which may be written 'auto', leaves it to us."""
Place = Annotated[
    str, AfterValidator(lambda text: re.sub("(^|@)~(?=/)", lambda m: m[1] + str(Path.home()), text))
]
"""A name, folder or file, or NAME@FOLDER; ~/ is the home directory, which a shell leaves alone after `--set key=`."""


def _as_text(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    whole = isinstance(value, numbers.Integral) and not isinstance(value, int)
    return int(value) if whole else value


Callee = Annotated[Place, BeforeValidator(named)]
"""A reward's or an encoder's name; in Python a function will do."""


def _as_prompts(value: Any) -> Any:
    """A prompt set's name or file as it is, prompts themselves as a list without spaces around them."""
    if isinstance(value, str):
        return value
    several = value if isinstance(value, list | tuple) else []
    if not several or not all(isinstance(each, str) and each.strip() for each in several):
        raise PydanticCustomError(
            "prompts",
            "Input should be a prompt set, a TXT or JSONL file, or a list of prompts, each some text",
        )
    if any(getattr(each, "metadata", None) for each in several):
        raise PydanticCustomError(
            "prompts", "Input should be the name of the JSONL file, for a list has no metadata"
        )
    return [each.strip() for each in value]


PromptSet = Annotated[Place | list[str], BeforeValidator(_as_prompts)]
"""A prompt set of the package, a file, or the prompts themselves."""
SectionKind = TypeVar("SectionKind", bound="Section")


class Section(BaseModel):
    """A part of the configuration: immutable, strict about types, no unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def __init__(self, **settings: Any) -> None:
        """Check the settings.

        Raises:
            InputError: as from `parse`.
        """
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise InputError(_told(_lines(error, type(self)), type(self).__name__)) from None

    # Else pydantic would make the sections within one by calling this, and lose where in it a mistake is.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def model_validate(cls, *arguments: Any, **settings: Any) -> Self:
        """Check a nested dictionary.

        Raises:
            InputError: as from `parse`.
        """
        try:
            return super().model_validate(*arguments, **settings)
        except ValidationError as error:
            raise InputError(_told(_lines(error, cls), cls.__name__)) from None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, settings: Any) -> Any:
        """Paths as text and NumPy's whole numbers as Python's: a configuration is text in the end."""
        return (
            {key: _as_text(value) for key, value in settings.items()}
            if isinstance(settings, dict)
            else settings
        )


class ModelConfig(Section):
    """Which model is fine-tuned."""

    path: Place = "tiny-animals"
    """A diffusers pipeline: 'tiny-animals' (embedded), a local folder, or a hub name; or one safetensors file, as A1111, ComfyUI and
    Civitai have them."""
    config: Place | None = None
    """Of a `path` that is one file: the pipeline that it was made from, a folder or hub name, for tokenizers, scheduler, settings and
    the parts that the file lacks. Null: the one that diffusers takes the weights for, from the hub; so it is needed without a
    network, and for what a file does not say, such as v-prediction."""
    revision: str | None = None
    """Branch, tag or commit on the hub, of `path` or `config`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision that the model computes in; trained weights and scored values are float32 always."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: a third slower, a fraction of the memory."""
    vae_slicing: bool = False
    """Decode one image at a time."""
    vae_tiling: bool = False
    """Decode in tiles, for large images on small cards; seams may show."""
    device: str = "auto"
    """'auto' takes a GPU if there is one; else 'cpu', 'cuda', 'cuda:1', 'mps'."""
    compile: bool = False
    """Compile the transformer blocks by torch.compile: a minute or more at first, faster steps afterwards on a GPU. On a
    CPU, where float32 layers of our own take the place of it, it does not pay. Compiled blocks round differently with and
    without gradients: samples are scored again before the update, as in half precision."""
    memory_budget: float | None = Field(default=None, gt=0)
    """GiB that a process may use, which batch sizes are fitted into before training where they are left open. Null:
    what a GPU has free, less a reserve; on a CPU nothing is fitted."""


class AdapterConfig(Section):
    """What is trained."""

    kind: Literal["lora", "full"] = "lora"
    """A LoRA, or every weight of the UNet or transformer: rank, alpha and targets then say nothing, and
    optimizer.learning_rate should be about 1e-5."""
    rank: Positive = 16
    """Of the LoRA: more can learn more, and takes more memory."""
    alpha: float = Field(default=16.0, gt=0)
    """The adapter's scale is alpha / rank."""
    targets: list[str] = Field(default=["to_q", "to_k", "to_v", "to_out.0"], min_length=1)
    """Module names that get an adapter: by default the attention projections."""
    start: Place | None = None
    """A LoRA to go on from, in place of a fresh one: a run, a checkpoint, a safetensors file that diffusers reads, a folder or hub
    name. Rank and targets must be no less than its own. What it is compared with, and held to by a KL, stays the model without it."""
    shard: bool = False
    """Of `full` and several processes: each holds and optimises a part of every weight (FSDP), not the whole."""


class PromptConfig(Section):
    """What is asked for."""

    set: PromptSet = "animals"
    """A prompt set of the package (animals, animals5, animals8, animals10, eval40, attributes, compositions), a TXT or JSONL
    file, or the prompts themselves: [a cat, a dog]."""
    per_iteration: Positive = 8
    """Prompts drawn in each iteration, without repetition until all were drawn."""


class SamplingConfig(Section):
    """How candidates are drawn."""

    steps: Positive = 10
    """Denoising steps T."""
    guidance_scale: float = Field(default=1.0, ge=0)
    """Classifier-free guidance; up to 1 it is none, as in diffusers, and the unconditional pass is skipped."""
    negative_prompt: str = ""
    """What guidance leads away from, in training as in evaluation; empty is the model's own empty prompt. Without a second
    branch, at a guidance scale up to 1 or in a model that is distilled for guidance (FLUX.1 dev), there is no place for it."""
    eta: float = Field(default=1.0, ge=0, le=1)
    """Noise of the DDIM sampler: 1 is ancestral sampling, 0 leaves nothing to score."""
    flow_sampler: Literal["sde", "dance", "cps"] = "sde"
    """How flow models (SD3, FLUX.1, FLUX.2, SANA, Qwen-Image, Z-Image) are made stochastic: Flow-GRPO's SDE; DanceGRPO's (`dance`), the
    same with equal noise at all times; or coefficients-preserving sampling."""
    noise_level: float = Field(default=0.7, ge=0)
    """How much noise the flow sampler adds (DanceGRPO's eta, of which it has 0.3, with `dance`); diffusion models have eta instead."""
    same_latent: bool = False
    """In training begin all candidates of a prompt at the same initial latent, so that they differ by the noise of the steps alone, as
    DanceGRPO and MixGRPO have it. What is drawn after training has latents of its own."""
    window: Positive | None = None
    """Add noise in so many denoising steps in training, one after the other; the others are those of the deterministic sampler
    (MixGRPO). `objective.timesteps` is then a share of these: 1.0 learns from all. Null: in all steps. What is drawn after
    training has noise in all."""
    window_every: Positive | None = None
    """Iterations after which the window moves on by one step, from the noisiest to the last with noise and over again; null
    leaves it at the noisiest."""
    window_choice: Literal["first", "random"] = "first"
    """Where it is: `first`, at the noisiest steps or moving on from there by `window_every`; or `random`, anywhere, drawn anew in each
    iteration (Flow-GRPO-Fast)."""
    window_within: Positive | None = None
    """The window stays within so many of the noisiest steps; null: all that have noise."""
    height: Positive | None = None
    """Pixels; null is the size that the model was made for."""
    width: Positive | None = None
    """As height."""
    candidates: Positive = 16
    """Images drawn per prompt, 2G."""
    batch_size: Size = None
    """Candidates denoised at once; changes speed and memory, no sample. Null or 'auto': 32 on a CPU, else 128, and
    less where model.memory_budget, or a GPU's memory, does not suffice."""
    overlap_reward: Literal["auto"] | bool = "auto"
    """Score each finished batch while the next one is denoised, in place of all images at the end. 'auto': for reward
    servers, and for compressibility beside a GPU; not where reward and model share a CPU's cores or a GPU."""

    @model_validator(mode="after")
    def _consistent(self) -> SamplingConfig:
        if self.window_every is not None and self.window is None:
            raise ValueError(
                "sampling.window_every: there is no window to move; give sampling.window, such as 3"
            )
        if self.window is None and (self.window_within is not None or self.window_choice != "first"):
            name = "window_choice" if self.window_within is None else "window_within"
            raise ValueError(f"sampling.{name}: there is no window; give sampling.window, such as 2")
        if self.window_choice == "random" and self.window_every is not None:
            raise ValueError(
                "sampling.window_every: is of a window that moves on; with sampling.window_choice 'random' leave it out"
            )
        if self.window is not None and self.window_within is not None and self.window > self.window_within:
            raise ValueError(
                f"sampling.window_within: expected at least sampling.window ({self.window}); got {self.window_within}"
            )
        return self


class RewardPart(Section):
    """One of several rewards that are trained on together."""

    name: Callee
    """As for a single reward."""
    weight: float = 1.0
    """What it is multiplied by once it is normalised. Below 0 training lowers it, at 0 it is only logged."""
    normalize: Literal["none", "prompt", "batch", "fixed"] = "none"
    """To mean 0 and standard deviation 1 over the candidates of its prompt, or of the whole iteration; by the fixed
    numbers below; or not at all."""
    mean: float = 0.0
    """Of `fixed`: what is subtracted."""
    std: float = Field(default=1.0, gt=0)
    """Of `fixed`: what divides."""

    @model_validator(mode="after")
    def _consistent(self) -> RewardPart:
        if self.normalize != "fixed" and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError(
                f"reward: mean and std go with normalize 'fixed'; {self.name} has normalize {self.normalize!r}"
            )
        return self


REWARD = "reward"
"""The setting whose mapping is from names to weights, not a section with keys of its own."""
_TAGS = ("<name>", "<parts>")


def _as_parts(value: Any) -> Any:
    """Names in a list, and a mapping from names to weights, as the parts that they stand for; anything else as it is."""
    if isinstance(value, dict) and not isinstance(value.get("name"), str):
        for name, weight in value.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise ValueError(f"reward.{name}: expected a number, the reward's weight; got {weight!r}")
        return [{"name": name, "weight": weight} for name, weight in value.items()]
    if isinstance(value, list):
        return [{"name": each} if isinstance(each, str) or callable(each) else each for each in value]
    return value


def _kind_of_reward(value: Any) -> str | None:
    named = isinstance(value, str) or callable(value)
    return _TAGS[0] if named else _TAGS[1] if isinstance(value, list) else None


RewardSetting = Annotated[
    Annotated[Callee, Tag(_TAGS[0])] | Annotated[list[RewardPart], Tag(_TAGS[1])],
    Discriminator(
        _kind_of_reward,
        custom_error_type="reward_kind",
        custom_error_message="Input should be a name, a list of names or of {name, weight, normalize}, or {name: weight}",
    ),
    BeforeValidator(_as_parts),
]
"""The name of a reward, or several with their weights."""


class SelectionConfig(Section):
    """Which candidates are learned from."""

    keep: Positive = 8
    """How many of the candidates, G."""
    strategy: Literal[
        "concentrated", "nearest_neighbor", "nearest_to_mean", "nearest_to_median", "contrast", "top", "random", "all",
    ] = "nearest_neighbor"  # fmt: skip
    """Which half: both readings of the paper's rule are here, `concentrated` (the window of least range) and
    `nearest_neighbor`; docs/log.md says why this one is the default."""


class PromptNoiseConfig(Section):
    """Noise-conditioned prompting."""

    eta: float = Field(default=0.05, ge=0)
    """Strength of the noise on the prompt embedding, in units of its root mean square."""
    schedule: Literal["linear", "constant", "cosine", "cads"] = "linear"
    """How it fades as denoising goes on: to 0 in a straight line, not at all, along a cosine, or as CADS has it
    (docs/method.md, 2.3)."""
    where: Literal["train", "test", "both", "neither"] = "train"
    """In training, in what `driftrl sample` and `evaluate` draw, in both, or in neither."""
    similarity: Place = "auto"
    """What scores prompt-image similarity, to warn of noise in training that is too strong: the name of a reward;
    `none`, not to check; or `auto`: the trained reward if it is a model that reads the prompt (pickscore, hpsv2,
    clipscore, imagereward, vqascore), else, for the embedded model, the embedded one."""


class AdvantageConfig(Section):
    """How rewards become advantages."""

    center: Literal["selected", "candidates"] = "selected"
    """What is subtracted: the mean of the kept group, or of all candidates of the prompt, as DanceGRPO has it; then the advantages of a
    group need not add up to 0."""
    scale: Literal["selected", "candidates", "global", "none"] = "selected"
    """What divides: the standard deviation of the kept group, of all candidates of the prompt, of the whole
    batch, or nothing."""
    clip: float = Field(default=5.0, gt=0)
    """Bound on the magnitude of an advantage, as DDPO has it; with objective.loss `nft` what is wholly good."""
    baseline: Literal["group", "running"] = "group"
    """What an image is compared with: the others of its group, or (`running`, DDPO) mean and standard deviation of
    the prompt's last rewards, this iteration's candidates included."""
    history: Positive = Field(default=64, le=1_000_000)
    """Of `running`: how many of a prompt's last rewards count."""
    min_history: Positive = 16
    """Of `running`: a prompt with fewer rewards than this is compared with the whole batch."""


class ShapingConfig(Section):
    """Potential-based diversity shaping."""

    ratio: float = Field(default=0.5, ge=0)
    """Lambda: weight of the intrinsic advantage. 0 switches shaping off."""
    clip: float = Field(default=1.0, ge=0)
    """Sigma: bound on the intrinsic advantage; at level `reward` on the bonus."""
    level: Literal["advantage", "reward", "multiply"] = "advantage"
    """Where the bonus enters: standardised and added to advantages; added to rewards as it is; or (`multiply`,
    GARDO) as a factor on positive advantages."""
    measure: Literal["pairwise", "nearest", "entropy", "clusters"] = "pairwise"
    """What the bonus measures: mean distance to the group's others; distance to the nearest; its logarithm (an
    estimate of entropy); or one over the size of the image's cluster."""
    neighbors: Positive = 1
    """Of `nearest` and `entropy`: to the how-many-th nearest."""
    clusters: Positive = 3
    """Of `clusters`: how many each group is split into."""
    potential: Literal["terminal", "stepwise"] = "terminal"
    """`terminal`: the image alone counts. `stepwise`: the group's variety among predicted clean latents at every
    step is a potential, so each step has an advantage of its own; distances are between latents, averaged down to 8
    x 8, for all steps and the image, and `encoder` is for the logs only."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Of `stepwise`: the discount."""
    target: float | None = Field(default=None, gt=0, le=2)
    """Share of the base model's diversity to keep of each prompt (0.7, say), whatever the reward and the length of training. Each prompt then has
    a lambda of its own, from `ratio` to 2: it rises while the prompt has less than that, and falls back while it has more. A prompt's
    first three groups tell what the base model has. Only at level `advantage`. null: lambda stays `ratio`."""
    target_rate: float = Field(default=0.1, ge=0)
    """How fast lambda follows `target`, by iterations that a prompt is drawn in."""
    encoder: Callee = "tiny-animals"
    """Image encoder whose cosine distances measure diversity: tiny-animals, dreamsim (or dreamsim:dino_vitb16 and
    other branches), policy:latents, policy:mid-block, a function of yours as module:function, or a model of transformers by folder or hub
    name."""


class ObjectiveConfig(Section):
    """What is minimised."""

    loss: Literal["clipped_surrogate", "nft", "awm", "dgpo", "adjoint", "draft"] = "clipped_surrogate"
    """The clipped surrogate of the steps that were drawn; or, of images noised anew, a contrast of good and bad ones (`nft`, DiffusionNFT),
    the pretraining loss weighed by advantages (`awm`, advantage weighted matching), or DPO's loss of a prompt's good images against its
    bad ones (`dgpo`): these three ask for no density, so that any sampler may draw. Or, for rewards that are differentiable, the gradient
    of the reward in the picture, carried back along the path that was drawn (`adjoint`, adjoint matching; `draft`, DRaFT-K, AlignProp)."""
    nft_beta: float = Field(default=1.0, gt=0)
    """Of `nft`: how far its two implicit policies stand from the one that drew. 1 makes the positive one the policy itself;
    less makes larger steps."""
    nft_decay: float = Field(default=1.0, ge=0, le=1)
    """Of `nft`: the policy that draws in training keeps min(nft_decay x iteration, nft_decay_max) of itself after each update,
    iterations counted from 0, and follows the trained one, which checkpoints hold, with the rest. 0 draws with the trained one; the
    paper has 0.001 and 0.5."""
    nft_decay_max: float = Field(default=0.9, ge=0, lt=1)
    """See `nft_decay`. The more it keeps, the steadier, and slower, training is."""
    awm_power: float = Field(default=0.25, gt=0, le=1)
    """Of `awm`: of the squared error; 1 is the pretraining loss as it is, less makes large errors count less."""
    awm_proximal: float = Field(default=5.0, ge=0)
    """Of `awm`: weight of the squared distance of velocities from those of the policy that drew, which holds an iteration's later optimiser
    steps."""
    awm_clip_range: float = Field(default=1.0, gt=0)
    """Of `awm`'s ratio; 1 hardly ever clips."""
    awm_decay: Decay = 0.0
    """Of `awm`: the proximal term is taken to an average of the trained weights that keeps so much of itself after each iteration, so that
    it pulls in every optimiser step; its authors' code has 0.3. 0: to the policy that drew, which holds an iteration's later steps only."""
    dgpo_beta: float = Field(default=100.0, gt=0)
    """Of `dgpo`: how sharply a prompt whose good images are preferred to its bad ones already, beside the reference, counts less."""
    dgpo_clip_range: float = Field(default=0.01, gt=0)
    """Of `dgpo`'s ratio to the policy that drew, beyond which an image gives no gradient."""
    adjoint_scale: float = Field(default=1.0, gt=0)
    """Of `adjoint`: what is learned is the base model times exp(adjoint_scale x advantage), the advantage's mean and standard deviation
    held; with advantage.scale `none` exp(adjoint_scale x reward). So with objective.timesteps 1 (with fewer it stays short of that) and noise
    that makes an image independent of where it began: sampling.eta 1, of flows sampling.noise_level 1.4142."""
    draft_steps: Positive = 1
    """Of `draft`: K, the last denoising steps that the gradient goes through, each of which is trained on."""
    trust_region: Literal["ratio", "normalized", "divergence"] = "ratio"
    """What keeps the clipped surrogate near the policy that drew: PPO's clipped ratio; the ratio without its drift, on the same scale at
    every step (`normalized`, GRPO-Guard), which also weighs the steps anew; or the exact divergence of the two policies (`divergence`,
    Flow-DPPO), which like the clipped ratio does nothing in an iteration's first optimiser step."""
    clip_range: float = Field(default=1e-4, gt=0)
    """Of the clipped surrogate's ratio, for log-probabilities that are means over latent dimensions."""
    max_kl: float = Field(default=1e-5, gt=0)
    """Of `divergence`: the KL, a mean over latent dimensions, beyond which no pair leads the policy farther away. Its authors' recipe has
    1e-5, their paper 1e-7, and 1e-6 with `cps`."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Beta: weight of the divergence from the reference: the base model, unless it moves."""
    divergence: Literal["kl", "wasserstein"] = "kl"
    """Its kind, in closed form: KL, or the squared 2-Wasserstein distance, which is the KL times twice the step's
    variance. Both are means over latent dimensions."""
    kl_schedule: Literal["uniform", "early", "durations"] = "uniform"
    """What it weighs along the denoising steps: the same; falling linearly from the first scored step to the last, mean 1 over them; or
    (`durations`) the time that the step takes, of 1 for all: the KL's unit in the code of Flow-GRPO and GARDO, whose beta then carries
    over."""
    kl_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the kept samples that it applies to: those that the trained reward ranks above what `kl_judges` do."""
    kl_judges: list[Place] = Field(default=["mirrored"], min_length=1)
    """Rewards to compare the trained one with: names as for `reward`, or `mirrored`, the trained reward of the
    mirrored picture. Asked only if `kl_share` is below 1."""
    reference_kl: float | None = Field(default=None, gt=0)
    """The reference moves to the current policy after an iteration whose mean divergence is above this."""
    reference_every: Positive | None = None
    """The reference moves to the current policy after so many iterations."""
    timesteps: float = Field(default=0.34, gt=0, le=1)
    """Share of the scored denoising steps that each sample is trained on; of all steps with `loss` `nft`, `awm` or `dgpo`,
    unless `kl_weight` wants those with a density. With `draft` it is all of its `draft_steps`."""
    timestep_choice: Literal["noisiest", "random"] = "noisiest"
    """Which steps: the first ones, which decide what the picture shows, or others for each sample (with `dgpo` for each prompt), drawn
    anew in each iteration (docs/log.md has the measurement)."""

    @property
    def asks_for_density(self) -> bool:
        """Whether steps without noise cannot be learned from."""
        return self.loss in ("clipped_surrogate", "adjoint") or self.kl_weight > 0

    @property
    def follows_gradient(self) -> bool:
        """Whether the reward must be differentiable in the images."""
        return self.loss in ("adjoint", "draft")


class OptimizerConfig(Section):
    """AdamW."""

    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """What `warmup` rises to, and `schedule` begins with; 1e-3 is for a LoRA, all weights want about 1e-5."""
    warmup: int = Field(default=0, ge=0)
    """Iterations in which the rate rises to its value in a straight line: 1/N of it in the first of N."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate goes on from there: as it is, or falling towards 0 at the end of `iterations`, in a straight line or along
    half a cosine. A run that is resumed for more iterations goes on at the rate that the longer run has there."""
    ema_decay: Decay | None = None
    """What an exponential moving average of the trained weights keeps of itself after each iteration, such as 0.95; less in
    the first ones, as in diffusers. Checkpoints then hand out the average: it is what `driftrl sample`, `evaluate` and `export`
    and diffusers draw with, while training goes on from the weights themselves. Null: no average."""
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.999), strict=False)
    """Decay of the two running means, each below 1."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Pulls the adapter's weights to 0, and so to the base model; with adapter.kind `full` the model's own."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """A longer gradient is scaled down to this."""
    updates: Positive = 2
    """Optimiser steps per iteration; the pairs are shared out among them."""
    epochs: Positive = 1
    """Passes over the pairs of an iteration."""
    batch_size: Size = None
    """(sample, timestep) pairs replayed at once; changes speed and memory, not the update. Null or 'auto': 48 on a
    CPU, else 96, and less where memory does not suffice."""
    one_pass: bool | Literal["auto"] = "auto"
    """Take gradients while the candidates are drawn, batch_size at once, in place of replaying them: the same optimiser step,
    up to rounding, for fewer passes over the network. It needs updates and epochs of 1, the clipped surrogate, a LoRA on linear layers, the noisiest
    steps (or all), objective.trust_region `ratio`, and neither objective.kl_weight nor a stepwise potential. 'auto': where that is given and it pays, which it does
    with fewer than 2 candidates for each that is kept (3 in half precision) and 1 GiB of gradients at most."""


class LoggingConfig(Section):
    """What a run leaves behind while it goes."""

    checkpoint_every: Positive = 10
    """Iterations between checkpoints; the last iteration always leaves one."""
    keep_last: Positive = 1000
    """The newest checkpoints that are kept."""
    keep_every: Positive | None = None
    """Checkpoints of iterations divisible by this are kept for good, such as 100."""
    images_every: Positive = 10
    """Iterations between grids of the candidates, written to images/."""
    trackers: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]
    """Where metrics go besides metrics.jsonl (docs/metrics.md); [] for nowhere."""


class GuardsConfig(Section):
    """When to try again, and when to give up."""

    max_failures: Positive = 3
    """Iterations in a row with a latent, reward, loss or gradient that is not finite, before the run ends."""
    reward_attempts: Positive = 3
    """How often a reward that raises or takes too long is tried."""
    reward_timeout: float | None = Field(default=None, gt=0)
    """Seconds that a reward may take for one call: an iteration's images, or, with sampling.overlap_reward, a batch of
    them; null waits for ever."""


class EvaluationConfig(Section):
    """What is measured, when training has ended and before."""

    prompts: PromptSet | None = None
    """As prompts.set. Null: eval40 after training on a prompt set of the package; else the prompts of the run, 40 of them
    at most, evenly spread."""
    images: int = Field(default=16, ge=2)
    """Images per prompt; the paper has 40."""
    at_end: bool = True
    """Evaluate base model and last checkpoint after `driftrl train`, and write report.html; of a run made in Python
    `driftrl evaluate RUN` does it."""
    every: Positive | None = None
    """Iterations after which these prompts are drawn while training goes on, from the same noise each time: reward, diversity and
    Vendi score beside the base model's go into metrics.jsonl and the trackers, pictures into images/. Null: never."""
    images_meanwhile: int = Field(default=4, ge=2)
    """Images per prompt then."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """Denoising steps of what is measured, the base model's too, as of Flow-GRPO, which trains with 10 and measures with 40. Null:
    those of sampling.steps."""
    deterministic: bool = False
    """Draw what is measured without noise on the way (DDIM with eta 0, a flow's plain steps), as stock pipelines and most projects'
    evaluations do, in place of the sampler that training draws with; of the base model too."""
    clip: str | None = None
    """The CLIP model that CLIP diversity and prompt-image similarity are measured with: a folder or a hub name, such as
    openai/clip-vit-large-patch14. Null is the embedded one for the embedded model; for other models both are left out."""


class TrainConfig(Section):
    """A whole run."""

    name: str = "drift"
    """Names the method; `driftrl compare` groups runs of the same name."""
    seed: int = Field(default=0, ge=0)
    """Of every random draw: the same seed, settings and machine give the same run."""
    iterations: int = Field(default=60, ge=0)
    """Rounds of drawing, scoring and updating."""
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    prompts: PromptConfig = PromptConfig()
    sampling: SamplingConfig = SamplingConfig()
    reward: RewardSetting = "tiny-animals"
    """A reward of the package, as NAME or NAME@FOLDER (docs/rewards.md), a function of yours as module:function, or a
    reward server as http://host:port; or several: a list of names, as {name: weight}, or as a list of {name, weight,
    normalize}."""
    reward_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision that the package's reward networks compute in; `auto` is bfloat16 on CUDA, else float32."""
    selection: SelectionConfig = SelectionConfig()
    prompt_noise: PromptNoiseConfig = PromptNoiseConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    shaping: ShapingConfig = ShapingConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    logging: LoggingConfig = LoggingConfig()
    guards: GuardsConfig = GuardsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @field_validator("name")
    @classmethod
    def _in_runs(cls, name: str) -> str:
        if not name.strip(". ") or not name.isprintable() or set(name) & set("/\\"):
            raise ValueError(
                f"name: expected a name without slashes, for it names a folder too; got {name!r}"
            )
        return name

    @field_validator("reward")
    @classmethod
    def _different_rewards(cls, reward: str | list[RewardPart]) -> str | list[RewardPart]:
        if isinstance(reward, str):
            return reward
        if not any(part.weight for part in reward):
            raise ValueError("reward: expected at least one reward whose weight is not 0; got none")
        names = [part.name for part in reward]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"reward: expected each name once; {', '.join(twice)} is there twice: add its weights"
            )
        return reward

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        keep, candidates = self.selection.keep, self.sampling.candidates
        if keep > candidates:
            raise ValueError(
                f"selection.keep: expected at most sampling.candidates ({candidates}); got {keep}; "
                "lower the one or raise the other"
            )
        if self.selection.strategy == "all" and keep != candidates:
            raise ValueError(
                f"selection.strategy: 'all' keeps every candidate, so selection.keep must be {candidates}; got {keep}"
            )
        if keep < 2:
            raise ValueError(
                "selection.keep: expected at least 2, for advantages are relative to a group; got 1"
            )
        shaping = self.shaping
        self._check_advantage()
        if shaping.measure in ("nearest", "entropy") and shaping.neighbors >= keep:
            raise ValueError(
                f"shaping.neighbors: expected less than selection.keep ({keep}); got {shaping.neighbors}"
            )
        if shaping.measure == "entropy" and shaping.level == "multiply":
            raise ValueError(
                "shaping.level: 'multiply' needs a measure that is not negative; 'entropy' is a logarithm"
            )
        if shaping.target is not None and shaping.level != "advantage":
            raise ValueError(
                f"shaping.level: with shaping.target expected 'advantage', where lambda needs no unit; got {shaping.level!r}"
            )
        if shaping.target is not None and shaping.ratio > 2:
            raise ValueError(
                f"shaping.ratio: with shaping.target lambda goes from this to 2; got {shaping.ratio:g}"
            )
        if shaping.potential == "stepwise" and shaping.level != "advantage":
            raise ValueError(
                f"shaping.level: potential 'stepwise' gives each step its own advantage, so level must be "
                f"'advantage'; got {shaping.level!r}"
            )
        self._check_same_latent()
        self._check_shard()
        self._check_start()
        self._check_denoising()
        if self.sampling.eta == 0 and self.objective.asks_for_density:
            raise ValueError(
                "sampling.eta: expected more than 0 to train, for without noise nothing is scored (which objective.loss 'nft', "
                "'awm', 'dgpo' and 'draft' with objective.kl_weight 0 do not ask for); got 0"
            )
        return self

    def _check_advantage(self) -> None:
        advantage, shaping = self.advantage, self.shaping
        if advantage.center == "candidates" and shaping.ratio > 0 and shaping.level == "reward":
            raise ValueError(
                "advantage.center: 'candidates' does not go with shaping.level 'reward', for those that are dropped have no diversity; "
                "leave it at 'selected'"
            )
        if advantage.baseline == "running":
            if advantage.center != "selected":
                raise ValueError(
                    f"advantage.center: baseline 'running' subtracts the history's mean; got {advantage.center!r}; leave it at "
                    "'selected'"
                )
            if advantage.scale != "selected":
                raise ValueError(
                    f"advantage.scale: baseline 'running' divides by the history's standard deviation; got "
                    f"{advantage.scale!r}; leave it at 'selected'"
                )
            if advantage.min_history > advantage.history:
                raise ValueError(
                    f"advantage.min_history: expected at most advantage.history ({advantage.history}); got "
                    f"{advantage.min_history}"
                )
            relative = [
                p for p in self.reward if isinstance(p, RewardPart) and p.normalize in ("prompt", "batch")
            ]
            if relative:
                raise ValueError(
                    f"reward: baseline 'running' compares with earlier iterations, {relative[0].name} with this one "
                    f"only, for it has normalize {relative[0].normalize!r}; use 'fixed' or 'none'"
                )
            if shaping.ratio > 0 and shaping.level == "reward":
                raise ValueError(
                    "shaping.level: 'reward' does not go with advantage.baseline 'running', whose history holds plain "
                    "rewards; use 'advantage'"
                )

    def _check_same_latent(self) -> None:
        still = "eta" if self.sampling.eta == 0 else "noise_level" if self.sampling.noise_level == 0 else ""
        if self.sampling.same_latent and still:
            raise ValueError(
                f"sampling.same_latent: with sampling.{still} 0 the candidates of a prompt would be one image, or differ by prompt noise "
                "alone; switch it off, or add noise to the steps"
            )

    def _check_denoising(self) -> None:
        loss = self.objective.loss
        if loss == "clipped_surrogate":
            return
        if self.objective.trust_region != "ratio":
            held = {"nft": "nft_decay", "awm": "awm_proximal", "dgpo": "dgpo_clip_range", "adjoint": "adjoint_scale",
                    "draft": "kl_weight"}[loss]  # fmt: skip
            raise ValueError(
                f"objective.trust_region: {self.objective.trust_region!r} is for the clipped surrogate; objective.loss {loss!r} is held "
                f"by objective.{held}"
            )
        if self.shaping.potential == "stepwise":
            raise ValueError(
                f"shaping.potential: 'stepwise' is of the steps that were drawn, and objective.loss {loss!r} learns from "
                f"{'the picture alone' if self.objective.follows_gradient else 'others'}; use 'terminal'"
            )
        if self.objective.follows_gradient:
            self._check_gradient(loss)

    def _check_gradient(self, loss: str) -> None:
        shaping, on = self.shaping, self.shaping.ratio > 0 or self.shaping.target is not None
        if on and shaping.level == "multiply":
            raise ValueError(
                f"shaping.level: 'multiply' weighs samples, and objective.loss {loss!r} follows the gradient of a sum; use 'advantage', or "
                "shaping.ratio 0"
            )
        if on and shaping.measure == "clusters":
            raise ValueError(
                f"shaping.measure: the sizes of clusters have no gradient, which objective.loss {loss!r} follows; use 'pairwise', or "
                "shaping.ratio 0"
            )
        names = [self.reward] if isinstance(self.reward, str) else [p.name for p in self.reward if p.weight]
        if served := [name for name in names if name.startswith(("http://", "https://"))]:
            raise ValueError(
                f"reward: a server sends no gradient, which objective.loss {loss!r} follows; {served[0]} goes with another loss, such as "
                "clipped_surrogate"
            )
        objective = self.objective
        if loss == "draft" and self.sampling.window is not None and objective.kl_weight > 0:
            raise ValueError(
                "objective.kl_weight: is of steps with noise, and with sampling.window the last ones, which objective.loss 'draft' learns "
                "from, need not have any; leave out the one or the other"
            )
        if loss == "draft" and objective.draft_steps > self.sampling.steps:
            raise ValueError(
                f"objective.draft_steps: expected at most sampling.steps ({self.sampling.steps}); got {objective.draft_steps}"
            )

    def _check_start(self) -> None:
        if self.adapter.start is not None and self.adapter.kind != "lora":
            raise ValueError(
                "adapter.start: is a LoRA, and adapter.kind 'full' trains none; merge it into the model, and name that as "
                "model.path"
            )

    def _check_shard(self) -> None:
        if not self.adapter.shard:
            return
        if self.adapter.kind != "full":
            raise ValueError("adapter.shard: goes with adapter.kind 'full'; a LoRA is small: leave it whole")
        if self.objective.reference_kl is not None or self.objective.reference_every is not None:
            raise ValueError(
                "adapter.shard: does not go with a reference that moves (objective.reference_...)"
            )
        if self.objective.loss != "clipped_surrogate":
            raise ValueError(
                f"adapter.shard: does not go with objective.loss {self.objective.loss!r}, which "
                + (
                    "takes gradients in the latents"
                    if self.objective.follows_gradient
                    else "keeps a copy of the policy that drew"
                )
            )
        if self.optimizer.ema_decay is not None:
            raise ValueError(
                "adapter.shard: does not go with optimizer.ema_decay, an average of whole weights"
            )
        if self.evaluation.every is not None:
            raise ValueError(
                "adapter.shard: does not go with evaluation.every, for processes with fewer prompts would not call the network as "
                "often; evaluate the checkpoints afterwards"
            )
        if self.shaping.encoder == "policy:mid-block":
            raise ValueError("adapter.shard: does not go with shaping.encoder 'policy:mid-block'")


def load_config(path: Path | str | None = None, overrides: Sequence[str] | None = None) -> TrainConfig:
    """Read a YAML file and apply ``key=value`` overrides (dotted keys, YAML values).

    A file may be a difference from another: its top-level key ``base`` names that file, relative to its own
    folder. The base is read first (it may have a base itself), then sections are merged key by key; a list or
    a single value replaces what the base has. The result is the same as of one file with everything in it.

    Raises:
        InputError: naming each bad key, what was given, what is allowed and the nearest valid name; for a base
            that cannot be read, or files that are each other's base.
    """
    path, pairs = None if path is None else Path(path), []
    for override in (
        overrides or []
    ):  # before any file is read: what was meant for --set may have become its name
        key, sign, text = override.partition("=")
        if not sign or not key.strip():
            raise InputError(
                f"--set: expected key=value, such as optimizer.learning_rate=1e-3; got {override!r}"
            )
        pairs.append((key, text))
    if path is not None and "=" in path.name and not path.exists():
        raise InputError(f"{path}: there is no such file; settings are given as --set {path}")
    if path is not None and not path.exists() and (meant := path.with_name(f"{path.name}.yaml")).is_file():
        raise InputError(f"{path}: there is no such file; did you mean {meant}?")
    data, source = read_config(path) if path is not None else ({}, "configuration")
    if "methods" in data:
        raise InputError(
            f"{path}: expected the configuration of a run; got a plan of several: driftrl experiment {path}"
        )
    for key, text in pairs:
        try:
            value = _parse_yaml(text)
        except (yaml.YAMLError, ValueError) as error:
            raise InputError(f"--set {key}: {text!r} is no YAML value") from error
        *parents, leaf = key.strip().split(".")
        place = data
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise InputError(f"--set {key}: '{parent}' has no keys of its own")
        place[leaf] = value
    return parse(TrainConfig, data, source, [key.strip() for key, _ in pairs])


def parse_config(data: dict[str, Any], source: str = "configuration") -> TrainConfig:
    """Check a nested dictionary against `TrainConfig`; `InputError` as from `parse`."""
    return parse(TrainConfig, data, source)


def parse(
    kind: type[SectionKind], data: dict[str, Any], source: str, typed: Sequence[str] = ()
) -> SectionKind:
    """Check a nested dictionary against a section.

    Args:
        kind: the section.
        data: its settings.
        source: where they come from, for messages.
        typed: dotted keys that come from ``--set`` instead.

    Raises:
        InputError: naming each bad key, what was given, what is allowed and the nearest valid name.
    """
    try:
        return cast(SectionKind, kind.__pydantic_validator__.validate_python(data))
    except ValidationError as error:
        raise InputError(_told(_lines(error, kind), source, typed)) from None


def _lines(error: ValidationError, kind: type[Section]) -> list[str]:
    """What is wrong with the settings of a section, each thing in a line that begins with its key."""
    return [_explain(problem, kind) for problem in error.errors()]


def _told(lines: Sequence[str], source: str, typed: Sequence[str] = ()) -> str:
    """The lines as one message, behind the name of where each comes from."""

    def by_set(line: str) -> bool:
        key = line.partition(":")[0]
        return any(f"{key}.".startswith(f"{one}.") or one.startswith(f"{key}.") for one in typed)

    own = [line for line in lines if not by_set(line)]
    told = [f"--set {line}" for line in lines if by_set(line)]
    return "\n  ".join([*told, *(f"{source}: {line}" for line in own[:1]), *own[1:]])


def read_config(path: Path) -> tuple[dict[str, Any], str]:
    """The data of a file merged onto that of its base, and the names of the files, for messages; nothing is checked.

    Raises:
        InputError: if a file cannot be read, or files are each other's base.
    """
    data, files = _read_with_base(path, ())
    return data, " based on ".join(str(file) for file in files)


def flat(config: TrainConfig) -> dict[str, Any]:
    """Every setting by its dotted key, as JSON has it."""
    return dict(_flat(config.model_dump(mode="json")))


def dump_config(config: TrainConfig) -> str:
    """The complete configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_with_base(path: Path, children: tuple[Path, ...]) -> tuple[dict[str, Any], list[Path]]:
    """The data of a file merged onto that of its base, and the files it came from, ``path`` first."""
    place = path.resolve()
    if place in children:
        raise InputError(
            f"{path}: base: goes round in a circle: {' -> '.join(map(str, (*children, place)))}; "
            "let one of them stand alone"
        )
    data = read_yaml(path)
    if "base" not in data:
        return data, [path]
    base = data.pop("base")
    if not isinstance(base, str) or not base:
        raise InputError(f"{path}: base: expected the path of a YAML file, such as base.yaml; got {base!r}")
    if not (path.parent / base).is_file():
        raise InputError(
            f"{path}: base: there is no file {path.parent / base}; a base is looked for beside the file that names it, and those in "
            "experiments/ are in a clone of driftrl"
        )
    below, files = _read_with_base(path.parent / base, (*children, place))
    return merged(below, data), [path, *files]


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the keys of ``change`` in their place, mappings key by key; but rewards with their weights are one value."""
    result = dict(base)
    for key, value in change.items():
        before = result.get(key)
        if key != REWARD and isinstance(before, dict) and isinstance(value, dict):
            result[key] = merged(before, value)
        else:
            result[key] = value
    return result


def read_yaml(path: Path) -> dict[str, Any]:
    """Keys and values of a YAML file, or `InputError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise InputError(f"{path}: cannot be read: {reason}") from error
    try:
        data = _parse_yaml(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f": line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise InputError(f"{path}: no valid YAML{place}{f': {problem}' if problem else ''}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected keys and values; got a {type(data).__name__}")
    return data


def _flat(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number, as YAML 1.2 does, and refuses a key that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As ever, once keys are known to differ."""
        seen: dict[str, yaml.ScalarNode] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    line = seen[key.value].start_mark.line + 1
                    raise yaml.MarkedYAMLError(
                        None,
                        None,
                        f"'{key.value}' is there already, in line {line}: join the two",
                        key.start_mark,
                    )
                seen[key.value] = key
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$"), list("-+.0123456789")
)


def _parse_yaml(text: str) -> Any:
    """What a YAML text says; `yaml.YAMLError` where it is none, or names a key twice, of which one would be lost."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


_DTYPES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "no": "float32"}
"""What others call the precisions."""
_METHODS = "methods are files: driftrl train experiments/methods/grpo.yaml (docs/methods.md)"
_ELSEWHERE = {
    "lr": "optimizer.learning_rate",
    "lambda": "shaping.ratio",
    "sigma": "shaping.clip",
    "beta": "objective.kl_weight",
    "kl": "objective.kl_weight",
    "group_size": "selection.keep",
    "num_generations": "sampling.candidates",
    "num_inference_steps": "sampling.steps",
    "num_steps": "sampling.steps",
    "cfg": "sampling.guidance_scale",
    "neg_prompt": "sampling.negative_prompt",
    "negative_prompts": "sampling.negative_prompt",
    "resolution": "sampling.height",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "target_modules": "adapter.targets",
    "mixed_precision": "model.dtype",
    "precision": "model.dtype",
    "pretrained_model_name_or_path": "model.path",
    "reward_fn": "reward",
    "max_steps": "iterations",
    "num_epochs": "iterations",
    "num_train_epochs": "iterations",
    "num_inner_epochs": "optimizer.epochs",
    "sample_num_steps": "sampling.steps",
    "sample_guidance_scale": "sampling.guidance_scale",
    "sample_eta": "sampling.eta",
    "sample_batch_size": "sampling.batch_size",
    "num_image_per_prompt": "sampling.candidates",
    "train_learning_rate": "optimizer.learning_rate",
    "train_batch_size": "optimizer.batch_size",
    "train_num_inner_epochs": "optimizer.epochs",
    "train_max_grad_norm": "optimizer.max_grad_norm",
    "train_clip_range": "objective.clip_range",
    "train_timestep_fraction": "objective.timesteps",
    "timestep_fraction": "objective.timesteps",
    "train_adv_clip_max": "advantage.clip",
    "adv_clip_max": "advantage.clip",
    "train_beta": "objective.kl_weight",
    "kl_mask_threshold": "objective.max_kl",
    "per_prompt_stat_tracking": "advantage.baseline",
    "buffer_size": "advantage.history",
    "per_prompt_stat_tracking_buffer_size": "advantage.history",
    "min_count": "advantage.min_history",
    "per_prompt_stat_tracking_min_count": "advantage.min_history",
    "num_batches_per_epoch": "prompts.per_iteration",
    "sample_num_batches_per_epoch": "prompts.per_iteration",
    "gradient_accumulation_steps": "optimizer.updates",
    "train_gradient_accumulation_steps": "optimizer.updates",
    "bestofn": "selection.keep",
    "pretrained_model": "model.path",
    "global_std": "advantage.scale",
    "sde_type": "sampling.flow_sampler",
    "sde_window_size": "sampling.window",
    "sde_window_range": "sampling.window_within",
    "same_latent": "sampling.same_latent",
    "init_same_noise": "sampling.same_latent",
    "lora_path": "adapter.start",
    "activation_checkpointing": "model.gradient_checkpointing",
    "lr_scheduler": "optimizer.schedule",
    "lr_warmup_steps": "optimizer.warmup",
    "ema": "optimizer.ema_decay",
    "use_ema": "optimizer.ema_decay",
    "save_freq": "logging.checkpoint_every",
    "eval_freq": "evaluation.every",
    "eval_num_steps": "evaluation.steps",
    "beta_dpo": "objective.dgpo_beta",
    "truncated_backprop_timestep": "objective.draft_steps",
    "truncated_rand_backprop_minmax": "objective.draft_steps",
    "truncated_backprop_rand": "objective.draft_steps",
    "num_checkpoint_limit": "logging.keep_last",
    "report_to": "logging.trackers",
    "log_with": "logging.trackers",
}
"""What the paper, diffusers, PEFT, TRL, Flow-GRPO and accelerate call our settings, for messages about keys that are not there."""


def setting_like(option: str) -> str:
    """The dotted key that a command line option such as ``--iterations`` stands for; "" if there is none.

    Example:
        >>> from driftrl.config import setting_like
        >>> setting_like("--learning-rate"), setting_like("--lora-rank"), setting_like("--nothing")
        ('optimizer.learning_rate', 'adapter.rank', '')
    """
    name = option.lstrip("-").replace("-", "_")
    keys = (k for ks in _by_leaf(TrainConfig).values() for k in ks if name in (k, k.split(".")[-1]))
    return next(keys, _ELSEWHERE.get(name, ""))


def _meant(name: str, section: str = "") -> str:
    """Our dotted key for another project's ``name``, in its ``section`` or on its own; "" if there is none."""
    own = _by_leaf(TrainConfig).get(name, [])
    return (
        _ELSEWHERE.get(f"{section}_{name}")
        or _ELSEWHERE.get(name)
        or (own[0] if section and len(own) == 1 else "")
    )


def _theirs(section: str, names: list[Any]) -> list[str]:
    """What the settings in a section of ddpo-pytorch or Flow-GRPO are here."""
    if section not in ("train", "sample", "pretrained"):
        return []
    return [f"{section}.{name} is '{own}'" for name in names if (own := _meant(str(name), section))]


def _by_leaf(section: Any, prefix: str = "") -> dict[str, list[str]]:
    """The dotted keys of a section and those in it, by the last part of each."""
    found: dict[str, list[str]] = {}
    for name, field in section.model_fields.items():
        found.setdefault(name, []).append(f"{prefix}{name}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            for leaf, keys in _by_leaf(field.annotation, f"{prefix}{name}.").items():
                found.setdefault(leaf, []).extend(keys)
    return found


def _explain(problem: Any, root: type[Section]) -> str:
    place = list(problem["loc"])
    if place[:1] == ["reward"] and place[1:2] in (
        [_TAGS[0]],
        [_TAGS[1]],
    ):  # no key, but which of its kinds it is
        del place[1]
    key = ".".join(str(part) for part in place)
    given, context = problem.get("input"), problem.get("ctx", {})
    if problem["type"] == "extra_forbidden":
        leaf, section = str(place[-1]), cast(Any, root)
        if root is TrainConfig and place[0] == "reward":
            section, place = RewardPart, place[-1:]
        for part in place[:-1]:
            # A number is a place in a list.
            section = get_args(section)[0] if isinstance(part, int) else section.model_fields[part].annotation
        names, known = list(section.model_fields), _by_leaf(root)
        if root is TrainConfig and isinstance(given, dict) and (told := _theirs(leaf, list(given))):
            return f"{key}: no such key; here {', '.join(told)}"
        own = _meant(leaf) if root is TrainConfig else ""
        ours = known.get(leaf) or ([own] if own else [])
        elsewhere = " or ".join(f"'{dotted}'" for dotted in ours)
        hint = f"; did you mean {elsewhere}?" if elsewhere else nearest(leaf, names)
        if not hint:
            hint = nearest(leaf, known)
            for name, dotted in known.items():
                hint = hint.replace(f"'{name}'", f"'{dotted[0]}'")
        hint = f"; {_METHODS}." if key == "method" and root is TrainConfig else hint
        return f"{key}: no such key{hint}{' A' if hint else '; a'}llowed here: {', '.join(names)}"
    if problem["type"] == "model_type":
        kind = root.model_fields[key].annotation if key in root.model_fields else None
        names = (
            list(cast(Any, kind).model_fields) if isinstance(kind, type) and issubclass(kind, Section) else []
        )
        hint = f"; it has settings of its own, such as {key}.{names[0]}: {', '.join(names)}" if names else ""
        return f"{key}: expected keys and values; got {given!r}{hint}"
    if problem["type"] == "missing":
        return f"{key}: is missing, and has no default"
    if problem["type"] == "value_error":
        return str(context.get("error", problem["msg"]))
    hint = ""
    if problem["type"] == "literal_error":
        options = [option.strip(" '") for option in str(context["expected"]).replace(" or ", ", ").split(",")]
        near = nearest(_DTYPES.get(str(given), str(given)), options)
        hint = f"{near} {_METHODS.capitalize()}" if key == "objective.loss" and near else near
    message = problem["msg"].removeprefix("Input should be ")
    return f"{key}: expected {message}; got {given!r}{hint}"
