"""Configuration to objects: the only place that reads the whole configuration, and the only registry."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from driftrl import checkpoint, hub, objects, one_pass, single_file
from driftrl.advantages import AdvantageRule
from driftrl.checks import InputError, nearest, one_of
from driftrl.config import AdapterConfig, ModelConfig, RewardPart, SamplingConfig, TrainConfig
from driftrl.distributed import ALONE, Team, join
from driftrl.gradients import on_demand
from driftrl.loading import reason
from driftrl.mixture import Part
from driftrl.objectives.advantage_weighted import AdvantageWeighted
from driftrl.objectives.gate import Anchor
from driftrl.objectives.group_preference import GroupPreference
from driftrl.objectives.negative_aware import NegativeAware
from driftrl.objectives.pathwise import AdjointMatching, DirectReward, PathwiseLoss
from driftrl.pipelines import PIPELINES, TINY_ANIMALS, load_pipeline, usual_sampling
from driftrl.policies.lora import WEIGHTS as LORA
from driftrl.policies.pipeline import DECODED_PIXELS, PipelinePolicy, Sampler
from driftrl.policies.stable_diffusion import StableDiffusionPolicy
from driftrl.policies.start import Start, layer_kind, load_start
from driftrl.prompts import called, trained, warn_of_doubles
from driftrl.rewards.calling import ask, scores_of, with_metadata
from driftrl.rewards.guarded import GuardedReward
from driftrl.rewards.several import SeveralRewards
from driftrl.rewards.tower import CLIPTower
from driftrl.rollout import PromptNoise, Window
from driftrl.schedule import rate_share
from driftrl.shaping import Shaping
from driftrl.terms import DenoisingLoss
from driftrl.trainer import Method, TrainingLoop
from driftrl.types import Encoder, Policy, Reward
from driftrl.update import Objective

POLICY_ENCODERS = ("policy:latents", "policy:mid-block")
REWARDS = (
    "tiny-animals", "pickscore", "hpsv2", "imagereward", "clipscore", "vqascore", "ocr", "aesthetic", "compressibility",
    "incompressibility",
)  # fmt: skip
NETWORKS = ("pickscore", "hpsv2", "clipscore", "aesthetic", "imagereward", "vqascore", "ocr")
"""Rewards whose weights are asked for as NAME@FOLDER, or come from the hub."""
FULL_RATE = 1e-4
"""The largest learning rate that all weights of a network are usually trained with."""
ON_THE_HOST = ("compressibility", "incompressibility")
"""Rewards that a CPU computes wherever the model is."""
READ_THE_PROMPT = ("tiny-animals", "pickscore", "hpsv2", "clipscore", "imagereward", "vqascore")
"""Rewards that say how well an image matches its prompt."""
REWARD_DTYPES = ("auto", "float32", "bfloat16")
WEIGHTS = {
    "pickscore": "yuvalkirstain/PickScore_v1",
    "clipscore": "openai/clip-vit-large-patch14",
    "vqascore": "Qwen/Qwen3-VL-2B-Instruct",
    "ocr": "Qwen/Qwen3-VL-2B-Instruct",
}
"""Where a reward's weights come from, unless it is asked for as NAME@FOLDER; the others are always asked so."""
Towers = dict[tuple[str, str, str, bool], CLIPTower]
"""CLIP models by folder, device, dtype and whether they pad, for rewards to share."""


class GuidanceWarning(UserWarning):
    """A model is about to be trained without the guidance that it usually needs."""


class GradientWarning(UserWarning):
    """A loss that follows the reward's gradient may not find what it is asked for."""


class UnlikelySettingWarning(UserWarning):
    """A default that suits the embedded model, or a LoRA, is about to be used for another model, or for all weights."""


def device_of(name: str) -> torch.device:
    """The device that a configuration names; of several processes each has a GPU of its own.

    Raises:
        InputError: if there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and join() != ALONE:
        raise InputError(
            f"model.device: of several processes each takes its own GPU; got {name!r}; use 'auto'"
        )
    if name == "cuda" and torch.cuda.is_available() and join() != ALONE:
        name = join().device
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise InputError(f"model.device: {name!r} is not available here; try 'auto' or 'cpu'") from error
    return device


def _demand_reachable(config: TrainConfig, measured: bool = True) -> None:
    """Refuse a configuration that needs the hub where it does not answer, and name all that is missing at once."""
    rewards = [config.reward] if isinstance(config.reward, str) else [part.name for part in config.reward]
    key, model = "model.path", config.model.path
    if single_file.named(model):
        key, model = "model.config", single_file.base_of(config.model)
    asked = [(key, model, "model_index.json", config.model.revision)]
    for name in rewards:
        kind, _, weights = name.partition("@")
        if kind in NETWORKS:
            asked.append((f"reward={kind}@", weights or WEIGHTS.get(kind, ""), "config.json", None))
    asked.append(("shaping.encoder", config.shaping.encoder, "config.json", None))
    if config.evaluation.at_end and measured:
        asked.append(("evaluation.clip", config.evaluation.clip or "", "config.json", None))
    asked = [one for one in asked if hub.of_hub(one[1])]
    if not asked or hub.answers():
        return
    missing = [(key, name) for key, name, file, revision in asked if not hub.has(name, file, revision)]
    if missing:
        keys = [f"{key}{'' if key.endswith('@') else '='}FOLDER" for key, _ in missing]
        raise InputError(
            f"the hub {hub.silence()}, and here are neither folders nor copies in its cache of "
            f"{', '.join(name for _, name in missing)}. Where there is a network: hf download NAME --local-dir FOLDER, "
            f"for each (docs/rewards.md has what to do for rewards that are converted); then --set "
            f"{' --set '.join(keys)}"
        )


def adapter_of(pipeline: Any, lora: str) -> tuple[AdapterConfig, Start]:
    """The settings of an adapter that holds the LoRA ``lora`` for ``pipeline``, and what it begins as.

    Raises:
        InputError: if it cannot be read, or is not of the UNet or transformer alone.
    """
    component = PIPELINES[type(pipeline).__name__].component
    try:
        source = _newest_of(lora)
        start = load_start(pipeline, component, getattr(pipeline, component), source)
    except InputError as error:
        raise InputError(str(error).replace("adapter.start:", "--lora:", 1)) from error
    rank = max(len(a) for a, _ in start.layers.values())
    targets = sorted({layer_kind(name) for name in start.layers})
    return AdapterConfig(rank=rank, alpha=float(rank), targets=targets, start=source), start


def build_policy(
    config: TrainConfig,
    adapter: bool = True,
    sharded: bool = False,
    pipeline: Any = None,
    start: bool | Start = False,
) -> PipelinePolicy:
    """The policy of a configuration, with fresh trainable weights unless told otherwise; of full fine-tuning each
    process holds all of them, or, ``sharded``, a part. ``pipeline`` is what `load_pipeline` gave, if it was asked. To
    ``start`` a run is to load ``adapter.start``, which its checkpoints have in them, unless it was loaded already.
    """
    pipeline = pipeline or load_pipeline(config.model)
    device = device_of(config.model.device)
    sampling, in_parts = config.sampling, adapter and sharded and config.adapter.kind == "full"
    policy = PIPELINES[type(pipeline).__name__](
        pipeline,
        Sampler(
            sampling.steps,
            sampling.guidance_scale,
            sampling.eta,
            sampling.flow_sampler,
            sampling.noise_level,
            sampling.height,
            sampling.width,
            sampling.negative_prompt,
        ),
        device,
        in_parts,
    )
    if config.model.vae_slicing:
        pipeline.vae.enable_slicing()
    if config.model.vae_tiling:
        pipeline.vae.enable_tiling()
    begin = start if isinstance(start, Start) else None
    if start is True and config.adapter.start:
        begin = policy.start_of(_newest_of(config.adapter.start))
    if config.model.compile:
        if sharded:
            raise InputError("model.compile: cannot be had with adapter.shard; switch one of them off")
        policy.compile_blocks()
    if adapter:
        lora = config.adapter
        if in_parts:
            policy.train_in_parts()
        elif lora.kind == "full":
            policy.train_fully()
        else:
            policy.add_lora(lora.rank, lora.alpha, lora.targets, config.seed, begin)
    if config.model.gradient_checkpointing:
        policy.network.enable_gradient_checkpointing()
    return policy


def _newest_of(start: str) -> str:
    """A LoRA as it is named, or of a run its last checkpoint; of a hub that does not answer the copy in this machine's cache."""
    if not Path(start).exists():
        beyond = hub.of_hub(start)
        if beyond and hub.answers():
            return start
        cached = hub.cached(start, LORA) if beyond else None
        if cached is None:
            raise InputError(
                f"adapter.start: {start}: there is no such run, checkpoint, folder or file here"
                f"{', and the hub does not answer' * beyond}; expected one of these, or the hub name OWNER/NAME of a LoRA"
            )
        return str(cached)
    if not (Path(start) / "config.yaml").is_file():
        return start
    newest = checkpoint.newest(Path(start) / "checkpoints")
    if newest is None:
        raise InputError(f"adapter.start: {start}: this run has no checkpoint yet")
    return str(newest)


def build_reward(
    name: str, device: torch.device, dtype: str = "float32", towers: Towers | None = None
) -> Reward:
    """A reward of the package, of an entry point in the group ``driftrl.rewards``, ``module:function``, or the
    URL of a reward server.

    Args:
        name: as above.
        device: where it computes.
        dtype: of a reward of the package that has a network: ``float32``, ``bfloat16``, or ``auto`` (bfloat16 on CUDA).
        towers: CLIP models that rewards built earlier stand on; this one shares them, or adds its own.

    Raises:
        InputError: if there is none of that name.
    """
    if name.startswith(("http://", "https://")):
        from driftrl.rewards.http import HTTPReward

        return HTTPReward(name)
    if one_of("dtype", dtype, REWARD_DTYPES) == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    towers = {} if towers is None else towers
    kind, _, weights = name.partition("@")
    if "," in name and not (weights and Path(weights).exists()):
        names = ", ".join(part.strip() for part in name.split(","))
        raise InputError(
            f"reward: expected one name; got {name!r}; several are a list, or have a weight each: --set 'reward=[{names}]', "
            f"--set 'reward={{{names.replace(',', ': 1,')}: 0.5}}'"
        )
    if name == "tiny-animals":
        from driftrl.rewards.clip import CLIPReward

        return CLIPReward(tower_of(TINY_ANIMALS / "scorer", device, dtype, towers))
    if kind in NETWORKS:
        return _model_reward(kind, weights or WEIGHTS.get(kind, ""), device, dtype, towers)
    if name in REWARDS:
        from driftrl.rewards import compressibility

        found: Reward = getattr(compressibility, name)
        return found
    if ":" in name:
        return _own(name)
    plugins = {point.name: point for point in entry_points(group="driftrl.rewards")}
    if name in plugins:
        try:
            plugin = plugins[name].load()
        except (Exception, SystemExit) as error:  # whatever a user's module does at its import
            raise InputError(
                f"reward: {name!r} cannot be loaded from its entry point {plugins[name].value}: {error}"
            ) from error
        return _usable(plugin, name)
    known = (*REWARDS, *plugins)
    module, _, function = name.rpartition(".")
    near = f"; did you mean '{module}:{function}'?" if module else nearest(name, known)
    raise InputError(
        f"reward: expected one of {', '.join(known)}, module:function, or http://host:port; got {name!r}{near}"
    )


def demand_reward(name: str) -> None:
    """Refuse the name of a reward that is not there, as far as that is known without its weights or its server.

    Raises:
        InputError: if there is none of that name.
    """
    known = name == "tiny-animals" or name.startswith(("http://", "https://"))
    if not known and name.partition("@")[0] not in NETWORKS:
        build_reward(name, torch.device("cpu"))


def _own(name: str) -> Reward:
    """The reward that ``module:function`` names, or ``python:NAME`` of `driftrl.objects`."""
    function = name.partition(":")[2]
    if function.isdecimal():
        raise InputError(
            f"reward: expected module:function, or http://host:port of a reward server; got {name!r}; did you mean "
            f"'http://{name}'?"
        )
    return _usable(objects.found(name, "reward"), name)


def _usable(reward: Any, name: str) -> Reward:
    """``reward``, of a user's module, if it can be called as one."""
    if not callable(reward):
        raise InputError(f"reward: {name} is no function; expected (images, prompts) -> Tensor[N]")
    if isinstance(reward, type):
        raise InputError(
            f"reward: {name} is a class; expected (images, prompts) -> Tensor[N], such as an instance of it that the module "
            f"holds: reward = {reward.__name__}()"
        )
    try:
        placed, named = with_metadata(reward, [])
        inspect.signature(reward).bind(None, None, *placed, **named)
    except TypeError as error:
        raise InputError(
            f"reward: {name}: expected (images, prompts) -> Tensor[N], or with metadata as a third argument; {error}"
        ) from None
    except ValueError:  # compiled functions do not say what they take
        pass
    found: Reward = reward
    return found


def _model_reward(kind: str, weights: str, device: torch.device, dtype: str, towers: Towers) -> Reward:
    from driftrl.rewards.aesthetic import AestheticReward, demand_head
    from driftrl.rewards.clip import CLIPReward
    from driftrl.rewards.imagereward import ImageReward
    from driftrl.rewards.ocr import OCRScore
    from driftrl.rewards.vqascore import VQAScore

    if not weights:
        raise InputError(
            f"reward: {kind} has no weights on the hub in a format that is safe to load; expected {kind}@FOLDER "
            "(docs/rewards.md says how to make one)"
        )
    if hub.of_hub(weights):
        hub.answers()
    elif not Path(weights).exists():
        raise InputError(
            f"reward: {kind} cannot be loaded from {weights}: there is no such folder; expected {kind}@FOLDER, or the hub name "
            f"{kind}@OWNER/NAME (docs/rewards.md)"
        )
    try:
        if kind == "imagereward":
            return ImageReward(weights, device, dtype=dtype)
        if kind == "vqascore":
            return VQAScore(weights, device, dtype=dtype)
        if kind == "ocr":
            return OCRScore(weights, device, dtype=dtype)
        if kind == "aesthetic":
            demand_head(weights)
            return AestheticReward(tower_of(weights, device, dtype, towers))
        return CLIPReward(tower_of(weights, device, dtype, towers, pad=kind == "hpsv2"), kind)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        known = kind in WEIGHTS or Path(weights).exists()
        why = reason(error) if known else "there is no such folder, and none on the hub that can be reached"
        raise InputError(
            f"reward: {kind} cannot be loaded from {weights}: {why}; download it, and name its folder: "
            f"{kind}@FOLDER (docs/rewards.md)"
        ) from error


def tower_of(
    folder: Path | str, device: torch.device, dtype: str, towers: Towers, pad: bool = False
) -> CLIPTower:
    """The CLIP model of a folder or hub name: the one in ``towers``, or a new one, which is put there."""
    place = str(Path(folder).resolve()) if Path(folder).exists() else str(folder)
    key = (place, str(device), dtype, pad)
    if key not in towers:
        towers[key] = CLIPTower(folder, device, dtype=dtype, pad=pad)
    return towers[key]


def build_training_reward(config: TrainConfig, towers: Towers | None = None) -> Reward:
    """The reward that a configuration trains on, guarded; of several, each guarded, a column each."""
    towers = {} if towers is None else towers
    if isinstance(config.reward, str):
        return _guarded(config, config.reward, towers)
    rewards = [_guarded(config, part.name, towers, part.name) for part in config.reward]
    return SeveralRewards(rewards, [part.weight != 0 for part in config.reward])


def parts_of(reward: str | Sequence[RewardPart]) -> tuple[Part, ...]:
    """How several rewards become one; nothing for a single one."""
    return () if isinstance(reward, str) else tuple(Part(**part.model_dump()) for part in reward)


def _guarded(config: TrainConfig, name: str, towers: Towers, title: str = "") -> GuardedReward:
    reward = build_reward(name, device_of(config.model.device), config.reward_dtype, towers)
    return GuardedReward(reward, config.guards.reward_attempts, config.guards.reward_timeout, name=title)


def build_judges(config: TrainConfig, reward: Reward, towers: Towers | None = None) -> tuple[Reward, ...]:
    """The rewards whose disagreement with ``reward`` gates the divergence; none where all samples are held."""
    objective, towers = config.objective, {} if towers is None else towers
    if objective.kl_weight == 0 or objective.kl_share == 1:
        return ()

    def judge(name: str) -> Reward:
        if name == "mirrored":
            return lambda images, prompts: reward(images.flip(-1), prompts)
        return _guarded(config, name, towers)

    return tuple(judge(name) for name in objective.kl_judges)


def build_similarity(config: TrainConfig, reward: Reward, towers: Towers | None = None) -> Reward | None:
    """What scores prompt-image similarity while prompts are noised in training; None where nothing does.

    ``auto`` shares the CLIP model of the trained ``reward``, or is that reward.
    """
    spec = config.prompt_noise
    if prompt_noise_of(config, "train").eta == 0 or spec.similarity == "none":
        return None
    name = spec.similarity
    if name == "auto":
        trained = [config.reward] if isinstance(config.reward, str) else [part.name for part in config.reward]
        reading = [one for one in trained if one.partition("@")[0] in READ_THE_PROMPT]
        if reading and isinstance(config.reward, str):
            return reward
        if not reading and config.model.path != "tiny-animals":
            return None
        name = reading[0] if reading else "tiny-animals"
    try:
        return _guarded(config, name, {} if towers is None else towers, "prompt_noise.similarity")
    except InputError as error:
        raise InputError(str(error).replace("reward:", "prompt_noise.similarity:", 1)) from error


def build_encoder(name: str, device: torch.device, policy: Policy | None = None) -> Encoder:
    """An image encoder by name.

    'tiny-animals'; 'dreamsim' or one of its branches, such as 'dreamsim:dino_vitb16'; 'policy:latents' or
    'policy:mid-block', which need ``policy``; 'module:function', or 'python:NAME' of `driftrl.objects`; else the folder or
    hub name of a model that transformers loads.

    Raises:
        InputError: if it cannot be loaded.
    """
    from driftrl.diversity.encoders import DREAMSIM, DreamSimEncoder, TransformersEncoder

    if name in DREAMSIM:
        return DreamSimEncoder(DREAMSIM[name], device)
    if name.partition(":")[0] in ("dreamsim", "policy"):
        one_of("shaping.encoder", name, (*POLICY_ENCODERS, *DREAMSIM))
        return _policy_encoder(name, policy)
    if ":" in name and not Path(name).exists():
        return _own_encoder(name)
    path = str(TINY_ANIMALS / "encoder") if name == "tiny-animals" else name
    if "/" not in path and not Path(path).exists():  # not worth asking the hub, whose names have an owner
        known = ("tiny-animals", *POLICY_ENCODERS, *DREAMSIM)
        raise InputError(
            f"shaping.encoder: expected one of {', '.join(known)}, module:function, a folder or a hub name as owner/model; got "
            f"{name!r}{nearest(name, known)}"
        )
    if hub.of_hub(path):
        hub.answers()
    try:
        return TransformersEncoder(path, device)
    except (OSError, ValueError) as error:
        raise InputError(
            f"shaping.encoder: expected 'tiny-animals', a folder or a hub name: {reason(error)}"
        ) from error


def demand_second_branch(policy: PipelinePolicy, negative_prompt: str | None) -> None:
    """Refuse a negative prompt that nothing would read.

    Raises:
        InputError: if there is one, and guidance has a single branch.
    """
    if negative_prompt and policy.branches == 1:
        raise InputError(
            f"sampling.negative_prompt: got {negative_prompt!r}; expected guidance of two branches, of which one "
            "reads it, and "
            + (
                f"at a guidance scale of {policy.sampler.guidance_scale:g} there is no second one"
                if policy.sampler.guidance_scale <= 1.0
                else "this model has its guidance built in, and no second one"
            )
        )


def _own_encoder(name: str) -> Encoder:
    encoder = objects.found(name, "shaping.encoder")
    if not callable(encoder) or isinstance(encoder, type):
        raise InputError(
            f"shaping.encoder: {name}: expected a function of images [N, 3, H, W] to features [N, D]; got {encoder!r}"
        )
    return partial(_features, name, encoder)


@on_demand
def _features(name: str, encoder: Encoder, images: Tensor) -> Tensor:
    """What a user's encoder makes of ``images``, if it is features."""
    features = encoder(images)
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
        got = f"shape {list(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise InputError(
            f"shaping.encoder: {name}: expected a tensor of features [{len(images)}, D], a row for each image; got {got}"
        )
    return features


def _policy_encoder(name: str, policy: Policy | None) -> Encoder:
    from driftrl.diversity.encoders import LatentEncoder, MidBlockEncoder

    if name == "policy:latents" and isinstance(policy, PipelinePolicy):
        return LatentEncoder(policy.pipeline.vae)
    if not isinstance(policy, StableDiffusionPolicy):
        needed = "an autoencoder" if name == "policy:latents" else "a UNet; 'policy:latents' needs none"
        raise InputError(f"shaping.encoder: {name} needs a policy with {needed}")
    timestep = policy.num_train_timesteps // 10  # lightly noised: the picture is all there
    alpha = float(policy.pipeline.scheduler.alphas_cumprod[timestep])
    return MidBlockEncoder(
        policy.pipeline.vae, policy.network, policy.without_prompt(), alpha, timestep, policy.reference
    )


def build_loop(
    config: TrainConfig, run: Path, team: Team = ALONE, start: bool = True, measured: bool = True
) -> TrainingLoop:
    """Everything that a run needs, ready to go; without ``start`` for going on from a checkpoint. What evaluation wants of the hub is
    asked for too, if it is to be ``measured``.
    """
    prompt_set = trained(config.prompts.set, run)
    if start:  # once: not again of a run that goes on
        warn_of_doubles(prompt_set, called(config.prompts.set))
    if config.prompts.per_iteration > len(prompt_set):
        raise InputError(
            f"prompts.per_iteration: expected at most {len(prompt_set)}, the prompts of {called(config.prompts.set)}; "
            f"got {config.prompts.per_iteration}"
        )
    if config.prompts.per_iteration < team.size:
        raise InputError(
            f"prompts.per_iteration: expected at least {team.size}, one for each process; got "
            f"{config.prompts.per_iteration}; ask for more, or start fewer processes"
        )
    sharded = config.adapter.shard and team.size > 1
    if sharded and config.prompts.per_iteration % team.size:
        raise InputError(
            f"prompts.per_iteration: with adapter.shard expected a multiple of the {team.size} processes, which must "
            f"call the network equally often; got {config.prompts.per_iteration}"
        )
    _demand_reachable(config, measured)
    towers: Towers = {}
    reward = build_training_reward(config, towers)
    policy = build_policy(config, sharded=sharded, start=start)
    encoder = build_encoder(config.shaping.encoder, policy.device, policy)
    if config.objective.asks_for_density and not bool(policy.scored.any()):
        raise InputError(
            f"sampling: none of the {len(policy.scored)} denoising steps has enough noise to be scored, so there is "
            "nothing to learn from; expected more sampling.steps, and sampling.eta or sampling.noise_level above 0"
        )
    if (window := config.sampling.window or 0) > (most := int(policy.scored.sum())):
        raise InputError(
            f"sampling.window: expected at most {most}, the denoising steps with noise; got {window}; "
            + ("raise sampling.steps or lower it" if most else "without noise leave it out")
        )
    demand_second_branch(policy, config.sampling.negative_prompt)
    if config.objective.follows_gradient:
        demand_gradient(config, policy, reward, encoder, prompt_set[0])
    if config.objective.loss == "adjoint":
        warn_of_adjoints(config, policy)
    _, usual = usual_sampling(policy.pipeline)
    unguided = policy.branches == 1 and config.sampling.guidance_scale <= 1.0 < usual
    if config.model.path != "tiny-animals" and unguided:
        warnings.warn(
            f"sampling.guidance_scale is {config.sampling.guidance_scale:g}, which is no guidance; models such as "
            f"{config.model.path} usually need about {usual}",
            GuidanceWarning,
            stacklevel=2,
        )
    for message in unlikely_settings(config):
        warnings.warn(message, UnlikelySettingWarning, stacklevel=2)
    optimizer = torch.optim.AdamW(
        policy.parameters(),
        lr=config.optimizer.learning_rate,
        betas=config.optimizer.betas,
        weight_decay=config.optimizer.weight_decay,
        fused=True if policy.device.type == "cuda" and not sharded else None,  # one kernel for all matrices
    )
    objective = objective_of(config, policy.device)
    if objective.pathwise is not None and objective.kl_weight > 0:
        demand_noise(policy, objective)
    return TrainingLoop(
        policy,
        reward,
        encoder,
        prompt_set,
        method_of(config),
        objective,
        optimizer,
        run / "checkpoints",
        seed=config.seed,
        prompts_per_iteration=config.prompts.per_iteration,
        rollout_batch=config.sampling.batch_size or default_batch(policy.device),
        checkpoint_every=config.logging.checkpoint_every,
        keep_last=config.logging.keep_last,
        keep_every=config.logging.keep_every,
        max_failures=config.guards.max_failures,
        configuration=config.model_dump(mode="json"),
        judges=build_judges(config, reward, towers),
        team=team,
        overlap_reward=overlaps(config, policy.device),
        similarity=build_similarity(config, reward, towers),
        in_one_pass=in_one_pass(config, policy, objective, team),
        schedule=schedule_of(config),
        ema_decay=config.optimizer.ema_decay,
        gradient_batch=followed_at_once(policy),
    )


def demand_gradient(
    config: TrainConfig, policy: PipelinePolicy, reward: Reward, encoder: Encoder, prompt: str
) -> None:
    """Refuse rewards, and an encoder whose diversity is shaped with, that say nothing of how they change with the image; warn of those that do
    not seem to change.

    Raises:
        InputError: if one of them is not differentiable, by one image of noise.
    """
    loss, guarded = config.objective.loss, getattr(reward, "rewards", (reward,))
    names = [config.reward] if isinstance(config.reward, str) else [part.name for part in config.reward]

    def scored(name: str, one: GuardedReward) -> Callable[[Tensor], Tensor]:
        return lambda images: scores_of(ask(one.reward, images, [prompt]), 1, f"reward {name}", followed=True)

    logged = _only_logged(config)
    asked = {f"reward {n}": scored(n, one) for n, one in zip(names, guarded, strict=True) if n not in logged}
    if config.shaping.ratio > 0 or config.shaping.target is not None:
        asked[f"shaping.encoder {config.shaping.encoder}"] = encoder
    for title, function in asked.items():
        images = torch.rand(1, *policy.image_shape, generator=torch.Generator().manual_seed(0))
        images = images.to(policy.device).requires_grad_()
        gradient, why = None, ""
        try:
            with torch.enable_grad():
                found = function(images)
                if found.requires_grad:  # be it for the sake of its own weights alone
                    (gradient,) = torch.autograd.grad(found.sum(), images, allow_unused=True)
        except InputError:
            raise
        except Exception as error:  # NumPy's and PIL's ways lead out of the graph with one
            why = f": {reason(error)}"
        if gradient is None:
            raise InputError(
                f"{title} is not differentiable in the images, and objective.loss {loss!r} follows its gradient; expected "
                "one that torch computes throughout (tiny-animals, pickscore, hpsv2, clipscore, imagereward, aesthetic, or a function "
                "of yours without no_grad, inference_mode, detach, item, NumPy or PIL), or another loss, such as "
                f"clipped_surrogate{why}"
            )
        if not bool(gradient.any()):
            warnings.warn(
                f"{title} has a gradient of 0 at an image of noise; where it is 0 everywhere, as that of rounded values, objective.loss "
                f"{loss!r} learns nothing from it",
                GradientWarning,
                stacklevel=2,
            )


def _only_logged(config: TrainConfig) -> set[str]:
    """Rewards that are measured and weigh nothing."""
    return (
        set() if isinstance(config.reward, str) else {part.name for part in config.reward if part.weight == 0}
    )


def warn_of_adjoints(config: TrainConfig, policy: PipelinePolicy) -> None:
    """Say where adjoint matching has other noise than its optimum is derived for."""
    from driftrl.policies.flow import FlowPolicy

    sampling = config.sampling
    asked = []
    if isinstance(policy, FlowPolicy):
        if sampling.flow_sampler != "sde" or abs(sampling.noise_level - math.sqrt(2)) > 0.01:
            asked.append("sampling.flow_sampler sde and sampling.noise_level 1.4142")
    elif sampling.eta < 1:
        asked.append("sampling.eta 1")
    if sampling.window is not None:
        asked.append("no sampling.window")
    if asked:
        warnings.warn(
            "objective.loss 'adjoint' ends in the base model times exp(adjoint_scale x advantage) only with noise that makes an image "
            f"independent of where it began: {' and '.join(asked)}. Here it follows the same gradient, to somewhere else",
            GradientWarning,
            stacklevel=2,
        )


def demand_noise(policy: PipelinePolicy, objective: Objective) -> None:
    """Refuse a divergence where none of the steps that are learned from has noise.

    Raises:
        InputError: if so.
    """
    learned = objective.followed(policy.scored)
    if not bool((learned & policy.scored).any()):
        last = int(learned.sum())
        raise InputError(
            f"objective.kl_weight: without noise there is no divergence, and the last {last} of this model's denoising steps "
            f"{'has' if last == 1 else 'have'} none; expected more objective.draft_steps, or 0"
        )


def followed_at_once(policy: PipelinePolicy) -> int:
    """Images through which the gradient of a reward is taken at once: a quarter of the pixels that are decoded without one."""
    _, height, width = policy.image_shape
    return max(1, min(64, DECODED_PIXELS // 4 // (height * width)))


def unlikely_settings(config: TrainConfig) -> list[str]:
    """What was probably left at its default by oversight, and what to set in its place."""
    found = []
    rewards = [config.reward] if isinstance(config.reward, str) else [part.name for part in config.reward]
    used = {"reward": rewards, "shaping.encoder": [config.shaping.encoder]}
    embedded = [key for key, names in used.items() if "tiny-animals" in names]
    if embedded and config.model.path != "tiny-animals":
        instead = {"reward": "reward=pickscore", "shaping.encoder": "shaping.encoder=dreamsim"}
        found.append(
            f"{' and '.join(embedded)}: 'tiny-animals' was made for the embedded model's drawings of 64 x 64 pixels, not for "
            f"{config.model.path}; name another, such as {' '.join(f'--set {instead[key]}' for key in embedded)}"
        )
    rate = config.optimizer.learning_rate
    if config.adapter.kind == "full" and rate > FULL_RATE:
        found.append(
            f"optimizer.learning_rate: {rate:g} is for a LoRA, and ruins a whole network (adapter.kind: full) in a few "
            "iterations; about 1e-5 is usual: --set optimizer.learning_rate=1e-5"
        )
    return found


def schedule_of(config: TrainConfig) -> Callable[[int], float]:
    """What share of its learning rate each iteration has."""
    optimizer = config.optimizer
    return partial(rate_share, iterations=config.iterations, warmup=optimizer.warmup, kind=optimizer.schedule)


def method_of(config: TrainConfig) -> Method:
    """What a configuration says of sampling, selection, advantages and shaping."""
    return Method(
        candidates=config.sampling.candidates,
        keep=config.selection.keep,
        strategy=config.selection.strategy,
        prompt_noise=prompt_noise_of(config, "train"),
        advantage=AdvantageRule(**config.advantage.model_dump()),
        shaping=Shaping(**config.shaping.model_dump(exclude={"encoder"})),
        anchor=Anchor(
            share=config.objective.kl_share,
            threshold=config.objective.reference_kl,
            every=config.objective.reference_every,
        ),
        rewards=parts_of(config.reward),
        window=window_of(config.sampling),
        same_latent=config.sampling.same_latent,
    )


def window_of(sampling: SamplingConfig) -> Window | None:
    """The denoising steps that have noise in training; None where all have."""
    if sampling.window is None:
        return None
    return Window(
        sampling.window, sampling.window_every, sampling.window_choice == "random", sampling.window_within
    )


def objective_of(config: TrainConfig, device: torch.device) -> Objective:
    """What the update minimises."""
    spec = config.objective
    denoising: DenoisingLoss | None = None
    if spec.loss == "nft":
        denoising = NegativeAware(spec.nft_beta, config.advantage.clip, spec.nft_decay, spec.nft_decay_max)
    elif spec.loss == "awm":
        denoising = AdvantageWeighted(spec.awm_power, spec.awm_proximal, spec.awm_clip_range, spec.awm_decay)
    elif spec.loss == "dgpo":
        denoising = GroupPreference(spec.dgpo_beta, spec.dgpo_clip_range)
    pathwise: PathwiseLoss | None = None
    if spec.loss == "adjoint":
        pathwise = AdjointMatching(spec.adjoint_scale)
    elif spec.loss == "draft":
        pathwise = DirectReward(spec.draft_steps)
    return Objective(
        clip_range=spec.clip_range,
        kl_weight=spec.kl_weight,
        timesteps=1.0 if spec.loss == "draft" else spec.timesteps,
        timestep_choice=spec.timestep_choice,
        updates=config.optimizer.updates,
        epochs=config.optimizer.epochs,
        batch_size=config.optimizer.batch_size or (48 if device.type == "cpu" else 96),
        max_grad_norm=config.optimizer.max_grad_norm,
        rescore=denoising is None and pathwise is None and rounds_by_batch(config.model, device),
        loss_scale=2.0**14 if config.model.dtype == "float16" else 1.0,
        divergence=spec.divergence,
        kl_schedule=spec.kl_schedule,
        denoising=denoising,
        pathwise=pathwise,
        trust_region=spec.trust_region,
        max_kl=spec.max_kl,
    )


def rounds_by_batch(model: ModelConfig, device: torch.device) -> bool:
    """Whether a log-probability depends, by more than the clip range bears, on the batch that it is computed in: in half
    precision, where blocks are compiled, and where a GPU's convolutions take TF32 for float32.
    """
    tf32 = device.type == "cuda" and (
        torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    )
    return model.dtype != "float32" or model.compile or tf32


def in_one_pass(config: TrainConfig, policy: PipelinePolicy, objective: Objective, team: Team) -> bool:
    """Whether gradients are taken while the candidates are drawn.

    Raises:
        InputError: if that is asked for and cannot be, saying why.
    """
    asked = config.optimizer.one_pass
    if asked is False:
        return False
    reason = one_pass.refusal(objective, config.shaping.potential)
    if reason is None and not policy.has_sample_gradients:
        reason = "adapter must be a LoRA on linear layers, and model.compile off: others have no gradients of single samples"
    if asked == "auto":
        candidates, prompts = config.sampling.candidates, -(-config.prompts.per_iteration // team.size)
        held = prompts * candidates * sum(p.numel() for p in policy.parameters())
        return reason is None and one_pass.pays(candidates, config.selection.keep, objective.rescore, held)
    if reason is not None:
        raise InputError(f"optimizer.one_pass: {reason}")
    return True


def default_batch(device: torch.device) -> int:
    """Images denoised at once where nobody said: what stays in a CPU's cache, or keeps a GPU busy."""
    return 32 if device.type == "cpu" else 128


def overlaps(config: TrainConfig, device: torch.device) -> bool:
    """Whether rewards are computed while the next images are drawn: where they do not want the same cores."""
    asked = config.sampling.overlap_reward
    if asked != "auto":
        return asked
    names = [config.reward] if isinstance(config.reward, str) else [part.name for part in config.reward]
    # On the GPU that draws, kernels of both wait in one queue, and beside each other they want its memory.
    beside = ON_THE_HOST if device.type == "cuda" else ()
    return any(name in beside or name.startswith(("http://", "https://")) for name in names)


def open_sizes(config: TrainConfig) -> tuple[bool, bool]:
    """Whether the batch sizes of rollout and update are left to `driftrl.probe.fit`."""
    return config.sampling.batch_size is None, config.optimizer.batch_size is None


def prompt_noise_of(config: TrainConfig, when: str) -> PromptNoise:
    """The prompt noise at ``when``, 'train' or 'test'."""
    spec = config.prompt_noise
    return PromptNoise(spec.eta if spec.where in (when, "both") else 0.0, spec.schedule)
