"""Every family of models through the same rollout, replay, training and saving."""

import itertools
import json
import math
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from peft.tuners.lora import Linear
from PIL import Image
from safetensors.torch import load_file, save_file

from driftrl import Trainer, noise
from driftrl.build import GuidanceWarning, build_encoder, build_loop, build_policy
from driftrl.checks import InputError
from driftrl.cli.sample import sample
from driftrl.config import ModelConfig, dump_config
from driftrl.diversity.encoders import encode_latents
from driftrl.evaluation.generate import generate, open_policy
from driftrl.objectives.negative_aware import NegativeAware
from driftrl.pictures import grid
from driftrl.pipelines import load_pipeline
from driftrl.policies.kohya import write_kohya
from driftrl.policies.long_prompts import LongPromptWarning
from driftrl.ratio import replay_untouched
from driftrl.rollout import PromptNoise, rollout, score_step
from driftrl.transitions import gaussian
from driftrl.update import Objective, update
from test_methods import shift

PROMPTS = ["a cat", "a dog"]
KEYS = [(0, 3, 0), (0, 3, 1)]
DIFFUSION = ("sd", "sd2", "sdxl")
VARIANTS = ("sd2", "sd35", "schnell")
FAMILIES = (*DIFFUSION, "sd3", "sd35", "flux", "schnell", "flux2", "klein", "sana", "qwen", "zimage")
BUILT_IN = ("flux", "flux2")
"""Families that are distilled for their guidance: there is no second branch."""


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TARGETS = {
    "sd": ["to_q", "to_out.0"], "sd2": [*ATTENTION, "conv1", "proj_in"], "sdxl": [*ATTENTION, "ff.net.0.proj", "conv2"],
    "sd3": [*ATTENTION, "add_k_proj", "ff.net.2"], "sd35": ATTENTION, "flux": ATTENTION,
    "schnell": [*ATTENTION, "add_q_proj", "proj_mlp"], "sana": [*ATTENTION, "conv_inverted"],
    "qwen": [*ATTENTION, "add_k_proj", "net.2"], "zimage": [*ATTENTION, "w1"],
    "flux2": [*ATTENTION, "add_k_proj", "to_qkv_mlp_proj"], "klein": ["to_q", "to_qkv_mlp_proj", "to_out", "linear_in"],
}  # fmt: skip
"""Layers that get an adapter where it is taken to the stock pipeline: not only attention projections."""


PIXELS = {"sana": 64}
"""Sides of images; 16 for the others."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory, epsilon_folder):
    root = tmp_path_factory.mktemp("families")
    return {
        "sd": epsilon_folder,
        "sd2": families.make_sd2(root / "sd2"),
        "sdxl": families.make_sdxl(root / "sdxl"),
        "sd3": families.make_sd3(root / "sd3"),
        "sd35": families.make_sd3(root / "sd35", medium35=True),
        "flux": families.make_flux(root / "flux"),
        "schnell": families.make_flux(root / "schnell", guidance=False),
        "flux2": families.make_flux2(root / "flux2"),
        "klein": families.make_klein(root / "klein"),
        "sana": families.make_sana(root / "sana"),
        "qwen": families.make_qwen(root / "qwen"),
        "zimage": families.make_zimage(root / "zimage"),
    }


# What varies least from another one is tried by `make test-slow`.
@pytest.fixture(params=[pytest.param(f, marks=pytest.mark.slow) if f in VARIANTS else f for f in FAMILIES])
def family(request):
    return request.param


def mostly(*quick):
    """A test of these families, and of the others by `make test-slow`: for what a family has little say in."""
    return pytest.mark.parametrize(
        "family", [f if f in quick else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
    )


@pytest.fixture
def settings(config, folders):
    """A configuration for a family; FLUX does not say its size in pixels, so it is given."""

    def make(family, **changes):
        size = dict.fromkeys(("sampling__height", "sampling__width"), PIXELS.get(family, 16))
        few = {"prompts__set": "animals8"}  # a text encoder may read a long instruction with each
        return config(**({"model__path": str(folders[family])} | few | size | changes))

    return make


def replay(policy, conditioning, drawn, spec, batch):
    latents, rows = drawn.latents.flatten(0, 1), torch.arange(2).repeat_interleave(drawn.latents.shape[1])
    out = torch.zeros(latents.shape[0], latents.shape[1] - 1)
    eps = None if drawn.prompt_noise is None else drawn.prompt_noise.flatten(0, 1)
    for step in policy.scored.nonzero()[:, 0].tolist():
        for part in torch.arange(len(latents)).split(batch):
            own = None if eps is None else eps[part]
            at = torch.full((len(part),), step)
            move = score_step(policy, latents[part, step], at, conditioning.rows(rows[part]), own, spec)
            out[part, step] = gaussian.log_prob(latents[part, step + 1], move.mean, move.std).detach()
    return out.unflatten(0, drawn.log_probs.shape[:2])


def samplers():
    """Every family by the SDE, one by CPS; the other pairs are slow."""
    every = itertools.product(FAMILIES, ("sde", "cps"))
    quick = {(family, "sde") for family in FAMILIES if family not in VARIANTS} | {("sd3", "cps")}
    return [pytest.param(*each, marks=() if each in quick else pytest.mark.slow) for each in every]


@pytest.mark.parametrize(("family", "sampler"), samplers())
def test_replay_has_ratio_one_also_with_gradient_checkpointing(settings, family, sampler):
    """Guidance and prompt noise on; the replay has gradients and so does checkpoint."""
    changes = {"sampling__flow_sampler": sampler, "model__gradient_checkpointing": True}
    policy = build_policy(settings(family, **changes))
    spec, conditioning = PromptNoise(0.05), policy.encode(PROMPTS)
    drawn = rollout(policy, conditioning, KEYS, 5, 4, spec)
    again = replay(policy, conditioning, drawn, spec, 3)
    assert int(policy.scored.sum()) >= 3 - (
        family in ("sd3", "sd35")
    )  # SD3's schedule ends in a step of std 0.008
    assert (drawn.log_probs[..., policy.scored] != 0).all()
    assert (again - drawn.log_probs).abs().max() <= 1e-6


@mostly("sd", "sd3", "sana")
def test_the_forward_process_is_the_schedulers_and_is_learned_from(settings, family):
    """What the negative-aware loss asks of a policy: drawn images noised again, and predicted from there."""
    policy = build_policy(settings(family))
    x0, eps = torch.randn(2, 3, *policy.latent_shape, generator=torch.Generator().manual_seed(0)).unbind()
    steps, scheduler = torch.tensor([0, 2, 3]), policy.pipeline.scheduler
    times = scheduler.timesteps[steps]
    noised = (
        scheduler.scale_noise(x0, times, eps)
        if hasattr(scheduler, "scale_noise")
        else scheduler.add_noise(x0, eps, times)
    )
    torch.testing.assert_close(policy.noised(x0, eps, steps), noised)
    conditioning, spec = policy.encode(PROMPTS), PromptNoise(0.05)
    drawn = rollout(policy, conditioning, KEYS, 3, 6, spec).path()
    stats = update(
        policy, torch.optim.SGD(policy.parameters(), lr=1.0), drawn, torch.tensor([[1.0, -1.0, 0.5]] * 2),
        conditioning, Objective(denoising=NegativeAware()), (0, 0), spec,
    )  # fmt: skip
    assert stats.pairs == 6 * len(policy.timesteps) and stats.grad_norm > 0 and math.isfinite(stats.loss)


@mostly("sd", "flux", "zimage")
def test_a_gradient_is_carried_back_through_guidance_and_network(settings, family):
    """Against a difference in a direction, for the policy and for its base model; and out of the autoencoder."""
    policy = build_policy(settings(family))
    conditioning = policy.encode(PROMPTS)
    shift(policy, 0)
    x, way, out = (
        noise.normal([noise.generator(i, 0, p, 0, "x") for p in (0, 1)], policy.latent_shape)
        for i in range(3)
    )
    at = torch.full((2,), 1)

    def mean(latents):
        return policy.transition(latents, at, conditioning).mean

    def check(function, size, weights):
        free = x.clone().requires_grad_()
        (found,) = torch.autograd.grad((function(free) * weights).sum(), free)
        with torch.no_grad():
            change = ((function(x + size * way) - function(x - size * way)) * weights).double().sum() / (
                2 * size
            )
        assert float((found * way).double().sum()) == pytest.approx(float(change), rel=0.02, abs=1e-3)

    check(mean, 1e-2, out)
    with policy.reference():
        check(mean, 1e-2, out)
    images = policy.decode(x)
    check(policy.decode, 1e-3, torch.randn(images.shape, generator=torch.Generator().manual_seed(3)))
    assert not policy.decode(x).requires_grad


@mostly("sd", "flux", "zimage")
def test_gradient_checkpointing_computes_again_and_changes_no_gradient(settings, family):
    gradients, calls = [], []
    for on in (False, True):
        policy, seen = build_policy(settings(family, model__gradient_checkpointing=on)), []
        policy.fast = None  # which is not used where activations are computed again
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
        blocks = [m for name, m in policy.network.named_modules() if name.endswith("to_q")]
        blocks[0].register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(1))
        latents = torch.randn(2, *policy.latent_shape, generator=draw)
        move = score_step(policy, latents, torch.tensor([0, 1]), policy.encode(PROMPTS), None, PromptNoise())
        (move.mean * torch.randn(move.mean.shape, generator=draw)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
        calls.append(len(seen))
    assert calls == [1, 2]
    assert gradients[0].norm() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "upcast", "wanted"),
    [("float16", True, "float32"), ("float16", False, "float16"), ("bfloat16", True, "bfloat16")],
)
def test_an_autoencoder_that_overflows_is_kept_in_float32(
    settings, family, folders, tmp_path, dtype, upcast, wanted
):
    """Where its configuration says so, as that of SDXL does, and only in float16."""
    folder = tmp_path / "model"
    shutil.copytree(folders[family], folder)
    path = folder / "vae/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"force_upcast": upcast}))
    policy = build_policy(settings(family, model__path=str(folder), model__dtype=dtype), adapter=False)
    assert policy.pipeline.vae.dtype == getattr(torch, wanted)
    assert policy.network.dtype == getattr(torch, dtype)
    images = policy.decode(torch.zeros(1, *policy.latent_shape))
    assert images.dtype == torch.float32 and bool(torch.isfinite(images).all())


def test_guidance_and_every_condition_reach_the_network(settings, family):
    """Images change with the guidance scale, the prompt, and each extra condition."""
    policy = build_policy(settings(family))
    conditioning = policy.encode(PROMPTS)
    base = rollout(policy, conditioning, KEYS, 2, 4).images
    other = build_policy(settings(family, sampling__guidance_scale=5.0))
    assert (rollout(other, conditioning, KEYS, 2, 4).images - base).abs().max() > 1e-4
    for name, value in conditioning.extra.items():
        if family in BUILT_IN and name.startswith("null_"):
            continue  # there is no second branch
        if name == "tokens":
            continue  # which says where prompt noise goes, and no more
        other = 1 - value.long() if name.endswith("mask") else value + 3 * (1 + value.abs())
        other = other.to(value.dtype)
        changed = {**conditioning.extra, name: other}
        moved = type(conditioning)(conditioning.embeds, conditioning.null_embeds, changed)
        assert (rollout(policy, moved, KEYS, 2, 4).images - base).abs().max() > 1e-6, name


@mostly("sd", "sdxl", "flux", "sana")
def test_other_numbers_of_steps_are_those_of_a_policy_built_for_them(settings, family):
    """There and back, a window of noise forgotten on the way."""
    policy = build_policy(settings(family, sampling__steps=3))
    policy.add_noise_in(range(1))
    for steps in (7, 3):
        policy.take_steps(steps)
        built = build_policy(settings(family, sampling__steps=steps))
        for name in ("timesteps", "durations", "scored"):
            assert torch.equal(getattr(policy, name), getattr(built, name))
        drawn, wanted = (generate(p, PROMPTS, 1) for p in (policy, built))
        assert torch.equal(drawn, wanted)


def test_images_are_encoded_on_the_scale_that_latents_are_decoded_from(settings, family):
    """As diversity by the policy's latents sees them."""
    policy = build_policy(settings(family), adapter=False)
    vae, images = (
        policy.pipeline.vae,
        torch.rand(2, *policy.image_shape, generator=torch.Generator().manual_seed(0)),
    )
    with torch.no_grad():
        latents = encode_latents(vae, images)
        found = vae.encode((2 * images - 1).unsqueeze(2) if family == "qwen" else 2 * images - 1)
    raw = found.latent if family == "sana" else found.latent_dist.mode()
    if family in ("flux2", "klein"):
        torch.testing.assert_close(latents, policy.pipeline._encode_vae_image(2 * images - 1, None))
    assert latents.shape[1:] == policy.latent_shape
    torch.testing.assert_close(policy._unscaled(latents), raw[:, :, 0] if family == "qwen" else raw)


def test_prompts_are_read_a_few_at_a_time(settings, family):
    """As many as memory is sure to suffice for, whatever the size of the prompt set; they come out the same."""
    policy, counts = build_policy(settings(family)), []
    prompts = ["a cat", "a dog", "two zebras", "a cow", "an owl"]
    whole = policy.encode(prompts)
    policy.prompts_at_once = 2
    encoders = [getattr(policy.pipeline, name) for name in policy.text_encoders]
    for encoder in encoders:
        if encoder is not None:
            encoder.register_forward_hook(lambda module, inputs, output: counts.append(len(output[0])))
    parts = policy.encode(prompts)
    assert max(counts) <= 2 and sum(counts) >= 5
    torch.testing.assert_close(parts.embeds, whole.embeds)
    torch.testing.assert_close(parts.null_embeds, whole.null_embeds)
    assert set(parts.extra) == set(whole.extra)
    for name, value in whole.extra.items():
        assert len(value) == 5
        torch.testing.assert_close(parts.extra[name], value)


def load_stock(folder, family):
    """SD3.5 without T5, which diffusers wants to be told."""
    import diffusers

    lacks = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd35" else {}
    return diffusers.DiffusionPipeline.from_pretrained(folder, **lacks)


def stock(pipeline, family, guidance, draw, extra=None, negative=""):
    arguments = {"true_cfg_scale": guidance, "negative_prompt": [""] * 4} if family == "schnell" else {}
    if family == "sdxl":
        arguments["negative_prompt"] = None
    if family == "qwen":
        return qwen_images(pipeline, guidance, draw, extra or {}, negative or " ")
    if family == "klein" and negative:
        arguments["negative_prompt_embeds"], _ = pipeline.encode_prompt([negative] * 4)
    elif negative and family != "flux2":
        arguments["negative_prompt"] = negative if family == "sana" else [negative] * 4
    if family == "sana":
        arguments["use_resolution_binning"] = False
    side = PIXELS.get(family, 16)
    return pipeline(
        prompt=[p for p in PROMPTS for _ in range(2)], num_inference_steps=4, guidance_scale=guidance, height=side, width=side,
        generator=draw, output_type="pt", **arguments, **(extra or {}),
    ).images  # fmt: skip


def qwen_images(pipeline, guidance, draw, extra, negative):
    """One prompt at a time, which is never padded; the pipeline would draw latents of its own order."""
    images = []
    for at, prompt in enumerate(p for p in PROMPTS for _ in range(2)):
        latents = torch.randn(1, 4, 8, 8, generator=draw[at])
        images.append(pipeline(
            prompt, negative_prompt=negative, true_cfg_scale=guidance, num_inference_steps=4, height=16, width=16,
            latents=pipeline._pack_latents(latents, 1, 4, 8, 8), output_type="pt", **extra,
        ).images)  # fmt: skip
    return torch.cat(images)


@pytest.mark.parametrize(
    ("guidance", "negative"),
    [pytest.param(0.0, "", marks=pytest.mark.slow), (1.0, ""), (2.5, ""), (2.5, "a blurry dog")],
)
def test_without_noise_it_is_the_stock_pipeline(settings, family, guidance, negative):
    """eta = 0, or noise level 0: the scheduler's own step, diffusers' own images; guidance up to 1 is none there."""
    changes = {
        "sampling__noise_level": 0.0,
        "sampling__flow_sampler": "cps",
        "sampling__guidance_scale": guidance,
        "sampling__negative_prompt": negative,
    }
    policy = build_policy(settings(family, **changes).model_copy(), adapter=False)
    if family in DIFFUSION:  # their noise is eta, which a training configuration refuses to switch off
        policy = type(policy)(policy.pipeline, _without_noise(policy.sampler), policy.device)
    ours = rollout(policy, policy.encode(PROMPTS), KEYS, 2, 3).images.flatten(0, 1)
    draw = [noise.generator(*key, n, "latents") for key in KEYS for n in range(2)]
    theirs = stock(policy.pipeline, family, guidance, draw, negative=negative)
    assert not bool(policy.scored.any())
    torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=0)


def test_a_negative_prompt_is_what_guidance_leads_away_from(settings, family):
    """Where it has a place; FLUX.1 [dev] and FLUX.2 [dev] are distilled for their guidance, and refuse one."""
    prompt = {"sampling__guidance_scale": 2.5, "sampling__negative_prompt": "a blurry dog"}
    if family in BUILT_IN:
        with pytest.raises(InputError, match=r"sampling\.negative_prompt: got 'a blurry dog'.*built in"):
            build_loop(settings(family, **prompt), Path("nowhere"))
        return
    without, asked = (
        build_policy(settings(family, **changes))
        for changes in (prompt | {"sampling__negative_prompt": ""}, prompt)
    )
    a, b = (policy.encode(PROMPTS) for policy in (without, asked))
    assert torch.equal(a.embeds, b.embeds) and not torch.equal(a.null_embeds, b.null_embeds)
    assert (generate(without, PROMPTS, 1) - generate(asked, PROMPTS, 1)).abs().max() > 1e-4


def _without_noise(sampler):
    from dataclasses import replace

    return replace(sampler, eta=0.0)


@mostly("sd", "sdxl", "sd3", "flux2", "sana", "qwen")
def test_one_iteration_and_the_adapter_in_the_stock_pipeline(settings, family, folders, tmp_path):
    """Train, then: what `driftrl sample --deterministic` writes is what stock diffusers draws with the adapter."""
    import diffusers

    run = tmp_path / "run"
    adapter = {"adapter__rank": 3, "adapter__alpha": 5.0, "adapter__targets": TARGETS[family]}
    Trainer(settings(family, iterations=1, optimizer__learning_rate=0.03, **adapter), run).run()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["policy/ratio_deviation"] <= 1e-6
    assert metrics[0]["policy/grad_norm"] > 0

    policy, _ = open_policy(run, deterministic=True)
    ours = generate(policy, PROMPTS, 2).flatten(0, 1)
    pipeline = load_stock(folders[family], family)
    if family in DIFFUSION:
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    keys = [(0, 2**31, place, n) for place in range(2) for n in range(2)]

    def draw():
        return [noise.generator(*key, "latents") for key in keys]

    before = stock(pipeline, family, 2.0, draw())
    pipeline.load_lora_weights(run / "checkpoints" / "000001")
    theirs = stock(pipeline, family, 2.0, draw())
    torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=0)
    assert (theirs - before).abs().max() > 1e-4
    sample(str(run), PROMPTS, None, 2, 0, tmp_path / "grid.png", False, None, None, deterministic=True)
    with Image.open(tmp_path / "grid.png") as written:
        assert np.array_equal(written, grid(list(ours.unflatten(0, (2, 2))), PROMPTS))


@mostly("sd3")
def test_training_goes_on_from_a_lora(settings, family, tmp_path):
    """Of another rank and scale, read as diffusers reads it: at first it computes the same."""
    few = {"adapter__rank": 2, "adapter__alpha": 5.0, "adapter__targets": TARGETS[family]}
    first = settings(family, iterations=1, optimizer__learning_rate=0.03, **few)
    ended = Trainer(first, tmp_path / "first").run() / "checkpoints" / "000001"
    more = few | {"adapter__rank": 3, "adapter__alpha": 1.0, "adapter__start": str(ended)}
    policy = build_policy(settings(family, **more), start=True)
    tuned, _ = open_policy(ended)
    drawn, expected = (generate(each, PROMPTS, 1) for each in (policy, tuned))
    torch.testing.assert_close(drawn, expected, atol=3e-5, rtol=0)
    with policy.reference():
        assert (generate(policy, PROMPTS, 1) - drawn).abs().max() > 1e-4


@mostly("sd", "sd3", "flux")
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_half_precision_is_rescored_in_the_updates_own_batches(settings, family, dtype):
    """What training compares agrees to a tenth of the clip range, whatever the rollout's batches were."""
    torch.manual_seed(0)
    config = settings(family, model__dtype=dtype)
    policy = build_policy(config)
    spec, conditioning = PromptNoise(0.05), policy.encode(PROMPTS)
    drawn = rollout(policy, conditioning, KEYS, 4, 5, spec)
    assert drawn.log_probs.dtype == drawn.latents.dtype == torch.float32
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    objective = Objective(batch_size=3, updates=2, rescore=True, loss_scale=2.0**14)
    stats = update(policy, optimizer, drawn, torch.randn(2, 4), conditioning, objective, (0, 0), spec)
    assert stats.ratio_deviation < 1e-5
    assert stats.grad_norm > 0


def test_masks_and_lengths_are_not_rounded(settings, family):
    """Half precision has no 257."""
    policy, seen = build_policy(settings(family, model__dtype="bfloat16")), {}
    conditioning, run = policy.encode(PROMPTS), policy._run

    def watched(latents, timesteps, embeds, extra):
        seen.update({name: value.dtype for name, value in extra.items()})
        return run(latents, timesteps, embeds, extra)

    policy._run = watched
    rollout(policy, conditioning, KEYS, 2, 4)
    counted = {name for name in conditioning.extra if name in ("mask", "length")}
    assert counted == {"sana": {"mask"}, "qwen": {"mask"}, "zimage": {"length"}}.get(family, set())
    assert all(seen[name] in (torch.bool, torch.int64) for name in counted)


@pytest.mark.parametrize("schedule", ["linear", "cads"])
@pytest.mark.parametrize("family", ["flux2", "klein", "qwen", "sana", "zimage"])
def test_prompt_noise_is_kept_off_padding(settings, family, schedule):
    """Whether padding is all zeros, or attended to and something else; and its strength is a matter of the prompt alone."""
    policy, seen = build_policy(settings(family, sampling__guidance_scale=0.0)), []
    clean, run = policy.encode(PROMPTS), policy._run
    tokens = clean.extra.get("tokens", (clean.embeds != 0).any(-1))
    assert 0 < int(tokens.sum()) < tokens.numel()

    def watched(latents, timesteps, embeds, extra):
        seen.append(embeds)
        return run(latents, timesteps, embeds, extra)

    policy._run = watched
    rollout(policy, clean, KEYS, 8, 16, PromptNoise(0.05, schedule))
    change = (seen[0].unflatten(0, (2, 8)) - clean.embeds[:, None]).transpose(1, 2)
    assert not bool(change[~tokens].any()) and bool(change[tokens].any(-1).all())
    if schedule == "linear":  # which begins at t = 1
        for moved, embeds, own in zip(change, clean.embeds, tokens, strict=True):
            share = moved[own].square().mean().sqrt() / embeds[own].square().mean().sqrt()
            assert float(share) == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("negative", ["", "a dog"])
@pytest.mark.parametrize("family", ["flux2", "klein", "zimage"])
def test_a_chat_template_is_no_part_of_the_prompt(settings, family, negative):
    negative = "" if family == "flux2" else negative  # which has no branch that would read it
    policy = build_policy(settings(family, sampling__negative_prompt=negative))
    words = getattr(policy.pipeline.tokenizer, "tokenizer", policy.pipeline.tokenizer)
    tokens = policy.encode(["a cat", "an ant"]).extra["tokens"]
    spelled = [words(text, add_special_tokens=False).input_ids for text in ("a cat", "an ant")]
    assert tokens.sum(1).tolist() == [len(each) for each in spelled]
    first = tokens.int().argmax(1)
    assert (
        all(bool(row[at : at + row.sum()].all()) for row, at in zip(tokens, first, strict=True))
        and first.min() > 0
    )


@mostly("sd", "sd3")
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_in_half_precision_a_lora_computes_in_it_too(settings, family, dtype):
    """And is trained in float32. PEFT copies what comes into a layer to float32 for it, and is hardly nearer to the same
    network in float32: the rounding of everything else decides.
    """

    def asked(dtype, cast=False):
        """Mean and gradient, and the precisions that matrices of LoRA have seen."""
        policy, seen = build_policy(settings(family, model__dtype=dtype)), set()
        policy.fast, draw = None, torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
        for layer in policy.network.modules():
            if isinstance(layer, Linear):
                layer.cast_input_dtype_enabled |= cast
                for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
                    matrix.register_forward_hook(lambda m, i, o: seen.update({i[0].dtype, o.dtype}))
        latents, steps = torch.randn(8, *policy.latent_shape, generator=draw), torch.tensor([0, 1] * 4)
        move = score_step(policy, latents, steps, policy.encode(PROMPTS * 4), None, PromptNoise())
        move.mean.square().sum().backward()
        assert (
            {p.dtype for p in policy.parameters()}
            == {p.grad.dtype for p in policy.parameters()}
            == {torch.float32}
        )
        return move.mean.detach(), torch.cat([p.grad.flatten() for p in policy.parameters()]), seen

    truth, (*ours, seen), (*peft, cast) = asked("float32"), asked(dtype), asked(dtype, cast=True)
    assert seen == {getattr(torch, dtype)} and cast == {torch.float32}
    for a, b, true, more in zip(ours, peft, truth, (1.3, 1.5), strict=False):
        assert (a - true).norm() < more * (b - true).norm()


def halves():
    """Four families in bfloat16 with checkpointing, one in float16 without; the other pairs are slow."""
    quick = {(family, "bfloat16", True) for family in ("sd", "sd3", "flux2", "sana")} | {
        ("sd3", "float16", False)
    }
    every = itertools.product(FAMILIES, ("bfloat16", "float16"), (True, False))
    return [pytest.param(*each, marks=() if each in quick else pytest.mark.slow) for each in every]


@pytest.mark.parametrize(("family", "dtype", "checkpointing"), halves())
def test_the_ratio_of_an_untouched_policy_in_half_precision(settings, family, dtype, checkpointing, capsys):
    """Over all scored steps, guidance and prompt noise on; measured and printed."""
    policy = build_policy(settings(family, model__dtype=dtype, model__gradient_checkpointing=checkpointing))
    found = replay_untouched(policy, PROMPTS, rescore=True)
    assert found.pairs == 8 * int(policy.scored.sum())
    with capsys.disabled():
        print(
            f"\n{family} {dtype}{', checkpointed' * checkpointing}: max |log-ratio| {found.log_ratio:.1e} over "
            f"{found.pairs} pairs, scored again by {found.from_rollout:.1e}",
            end=" ",
        )
    assert found.log_ratio < 1e-5


@pytest.mark.parametrize("region", ["ratio", pytest.param("divergence", marks=pytest.mark.slow)])
@pytest.mark.parametrize("batch", [pytest.param(4, marks=pytest.mark.slow), 3])
def test_rescoring_makes_up_for_a_network_that_depends_on_its_batch(settings, batch, region):
    """Without it the first step's ratios are off by more than the clip range, and divergences beyond their limit; with it they
    are 1 and 0, also where the last batch of an optimiser step is smaller and pairs without advantage are left out.
    """

    class Moody:
        def __init__(self, policy):
            self.policy = policy

        def __getattr__(self, name):
            return getattr(self.policy, name)

        def transition(self, latents, steps, conditioning):
            move = self.policy.transition(latents, steps, conditioning)
            return move._replace(mean=move.mean + 0.01 * move.std * len(latents))

    found = {}
    for rescore in (False, True):
        policy = Moody(build_policy(settings("sd")))
        conditioning = policy.encode(PROMPTS)
        drawn = rollout(policy, conditioning, KEYS, 4, 8, keep_means=region == "divergence")
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
        advantages = torch.tensor([[1.0, -1, 2, 0], [0.5, -1, 1, -0.5]])
        objective = Objective(
            batch_size=batch, updates=2, epochs=2, rescore=rescore, trust_region=region, max_kl=1e-9
        )
        found[rescore] = update(policy, optimizer, drawn, advantages, conditioning, objective, (0, 0))
    assert found[False].ratio_deviation > 1e-3 > 1e-6 > found[True].ratio_deviation
    assert found[True].rescored_by > 1e-3 and found[False].rescored_by == 0
    assert found[True].clip_fraction == 0 < found[False].clip_fraction


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_the_normalized_ratio_s_first_gradient_is_the_plain_one_s_weighed_by_noise_over_time(
    settings, family
):
    """Of one step at a time: GRPO-Guard's std / dt, with the mean of 1 / dt over the trained steps taken out."""
    policy = build_policy(settings(family))
    conditioning = policy.encode(PROMPTS)
    drawn = rollout(policy, conditioning, KEYS, 4, 8, keep_means=True)
    steps = policy.scored.nonzero()[:, 0]
    std = policy.transition(drawn.latents[0, :1, 0], steps[:1], conditioning.rows(torch.tensor([0]))).std
    norms, optimizer = {}, torch.optim.SGD(policy.parameters(), lr=0.0)
    for region in ("ratio", "normalized"):
        advantages = torch.zeros(2, 4, len(policy.timesteps))
        advantages[..., steps[0]] = torch.tensor([[1.0, -1, 2, -2], [0.5, -1, 1, -0.5]])
        objective = Objective(trust_region=region, max_grad_norm=1e9)
        norms[region] = update(
            policy, optimizer, drawn, advantages, conditioning, objective, (0, 0)
        ).grad_norm
    inverse = 1 / policy.durations[steps]
    expected = float(std.flatten()[0]) * float(inverse[0] / inverse.mean())
    assert norms["normalized"] / norms["ratio"] == pytest.approx(expected, rel=1e-3)
    assert float(policy.durations.sum()) == pytest.approx(1)


def test_the_loss_scale_changes_no_gradient(settings):
    """A power of two, put in and taken out."""
    norms = []
    for scale in (1.0, 2.0**14):
        policy = build_policy(settings("sd"))
        conditioning = policy.encode(PROMPTS)
        drawn = rollout(policy, conditioning, KEYS, 4, 8)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
        advantages = torch.tensor([[1.0, -1, 2, -2], [0.5, -1, 1, -0.5]])
        norms.append(
            update(policy, optimizer, drawn, advantages, conditioning, Objective(loss_scale=scale), (0, 0))
        )
    assert norms[0].grad_norm == pytest.approx(norms[1].grad_norm, rel=1e-6)


@mostly("sd3")
@pytest.mark.filterwarnings("ignore::driftrl.build.UnlikelySettingWarning")
def test_full_fine_tuning_trains_saves_and_resumes(settings, family, folders, tmp_path):
    """The checkpoint is a network that diffusers loads; the base model stays at hand; resuming changes nothing."""

    changes = {"adapter__kind": "full", "optimizer__learning_rate": 1e-3}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    Trainer(settings(family, iterations=2, **changes), whole).run()
    Trainer(settings(family, iterations=1, **changes), parts).run()
    Trainer(settings(family, iterations=2, **changes), parts, resume=True).run()
    last = [run / "checkpoints" / "000002" / "diffusion_pytorch_model.safetensors" for run in (whole, parts)]
    assert last[0].read_bytes() == last[1].read_bytes()

    policy, _ = open_policy(whole)
    loaded = type(policy.network).from_pretrained(last[0].parent)
    base = getattr(load_stock(folders[family], family), policy.component)
    for name, value in policy.network.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), value)
    moved = [not torch.equal(base.get_parameter(n), v) for n, v in policy.network.named_parameters()]
    assert sum(moved) > len(moved) / 2
    with policy.reference():
        assert all(torch.equal(base.get_parameter(n), v) for n, v in policy.network.named_parameters())
    assert all(torch.equal(loaded.get_parameter(n), v) for n, v in policy.network.named_parameters())


def test_full_fine_tuning_in_half_precision_keeps_float32_weights(settings, family):
    policy = build_policy(settings(family, adapter__kind="full", model__dtype="bfloat16"))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    drawn = rollout(policy, policy.encode(PROMPTS), KEYS, 2, 4)
    assert torch.isfinite(drawn.images).all()


@mostly()
def test_in_half_precision_a_network_in_parts_computes_as_it_came(settings, family, launch, tmp_path):
    """Times and rotations in float32 included, with which some families call their blocks."""
    path = tmp_path / "run.yaml"
    path.write_text(
        dump_config(settings(family, adapter__kind="full", adapter__shard=True, model__dtype="bfloat16"))
    )
    script = Path(__file__).parent.with_name("in_parts.py")
    statuses, said = launch(tmp_path, 2, script, path, tmp_path / "saved")
    assert statuses == [0, 0], said


@mostly("sd", "flux", "sana")
def test_image_size_slicing_and_tiling(settings, family):
    """A larger picture than the model was made for; slicing changes nothing but memory."""
    height, width = (PIXELS.get(family, 16) * times // 2 for times in (3, 4))
    size = {"sampling__height": height, "sampling__width": width}
    policy = build_policy(settings(family, **size))
    drawn = rollout(policy, policy.encode(PROMPTS), KEYS, 2, 4)
    assert drawn.images.shape[-2:] == (height, width)
    sliced = build_policy(settings(family, **size, model__vae_slicing=True))
    torch.testing.assert_close(sliced.decode(drawn.latents[0, :, -1]), drawn.images[0], atol=1e-5, rtol=0)
    tiled = build_policy(settings(family, model__vae_tiling=True))
    assert tiled.pipeline.vae.use_tiling


def test_images_are_measured_by_the_models_own_latents(settings, family):
    """As evaluation does, beside other encoders; at the size that the model drew."""
    policy = build_policy(settings(family))
    images = rollout(policy, policy.encode(PROMPTS), KEYS, 2, 4).images.flatten(0, 1)
    features = build_encoder("policy:latents", torch.device("cpu"), policy)(images)
    assert features.shape == (4, math.prod(policy.latent_shape))
    assert bool(torch.isfinite(features).all())
    assert (features[0] - features[2]).abs().max() > 1e-3


def test_refuses_sizes_that_the_model_cannot_draw(settings, family):
    with pytest.raises(InputError, match=r"sampling.width: expected a multiple of \d+ pixels; got 17"):
        build_policy(settings(family, sampling__width=17))


def test_refuses_adapters_that_fit_nothing(settings, family):
    with pytest.raises(
        InputError, match=r"adapter.targets: .* no linear or convolution layer named to_nowhere"
    ):
        build_policy(settings(family, adapter__targets=["to_q", "to_nowhere"]))


def test_warns_of_training_without_guidance(settings, tmp_path):
    """But not where the model was made to do without."""
    for scale in (1.0, 0.0):
        with pytest.warns(GuidanceWarning, match=f"guidance_scale is {scale:g}, .* usually need about 4.5"):
            Trainer(
                settings("sd3", iterations=0, sampling__guidance_scale=scale), tmp_path / f"{scale}"
            ).run()
    Trainer(settings("schnell", iterations=0, sampling__guidance_scale=0.0), tmp_path / "schnell").run()


def test_a_distilled_klein_is_drawn_without_guidance(settings, folders, tmp_path):
    """Its pipeline says that it is one, and ignores the scale."""
    folder = tmp_path / "distilled"
    shutil.copytree(folders["klein"], folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": True}))
    scaled, plain = (
        build_policy(settings("klein", model__path=str(path), sampling__guidance_scale=scale))
        for path, scale in ((folder, 4.0), (folders["klein"], 1.0))
    )
    assert scaled.branches == plain.branches == 1
    assert torch.equal(*(generate(policy, PROMPTS, 1) for policy in (scaled, plain)))
    policy, _ = open_policy(folder)
    assert (len(policy.timesteps), policy.sampler.guidance_scale) == (4, 1.0)


def test_a_model_without_a_run_is_sampled_as_people_do(folders, monkeypatch, tmp_path):
    """By its pipeline, wherever it comes from, FLUX by whether it takes guidance, and Z-Image by its name."""
    import diffusers

    def usual(source, **asked):
        policy, _ = open_policy(source, **asked)
        return len(policy.timesteps), policy.sampler.guidance_scale, policy.branches

    assert usual(folders["sd3"]) == (28, 4.5, 2)
    assert usual(folders["sd3"], steps=3) == (3, 4.5, 2)
    assert usual(folders["flux"]) == (28, 3.5, 1)
    assert usual(folders["schnell"]) == (4, 1.0, 1)
    assert usual(folders["flux2"]) == (50, 4.0, 1)
    assert usual(folders["klein"]) == usual(folders["zimage"]) == (50, 4.0, 2)
    (tmp_path / "Z-Image-Turbo").symlink_to(folders["zimage"])
    assert usual(tmp_path / "Z-Image-Turbo") == (9, 0.0, 1)
    own = diffusers.DiffusionPipeline.from_pretrained
    monkeypatch.setattr(
        diffusers.DiffusionPipeline, "from_pretrained", lambda name, **named: own(folders["sd"], **named)
    )
    assert usual("someone/a-model-of-the-hub") == (50, 5.0, 2)


@pytest.mark.parametrize("family", ["sd", "qwen", "klein"])
def test_names_that_comfyui_knows(settings, family, tmp_path):
    """Of UNets with underscores, of transformers diffusers' own; alpha is a tensor beside each pair."""
    policy = build_policy(settings(family))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_()
    policy.save_adapter(tmp_path)
    ours = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    theirs = load_file(
        write_kohya(tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "comfyui.safetensors")
    )
    layer = {"sd": "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
             "qwen": "transformer.transformer_blocks.0.attn.to_q",
             "klein": "transformer.transformer_blocks.0.attn.to_q"}[family]  # fmt: skip
    place = f"lora_{layer.replace('.', '_')}" if family == "sd" else layer
    down = next(
        value
        for name, value in ours.items()
        if name.startswith(layer) and ("down" in name or "lora_A" in name)
    )
    assert torch.equal(theirs[f"{place}.lora_down.weight"], down)
    assert theirs[f"{place}.alpha"] == 2.0 and len(theirs) == len(ours) * 3 / 2


def test_refuses_to_train_without_noise(settings, tmp_path):
    with pytest.raises(InputError, match=r"none of the 4 denoising steps has enough noise"):
        Trainer(settings("sd3", sampling__noise_level=0.0), tmp_path / "run").run()
    with pytest.raises(InputError, match=r"none of the 4 denoising steps has enough noise"):
        Trainer(settings("sd", sampling__eta=1e-4), tmp_path / "run").run()


@pytest.mark.filterwarnings(
    "ignore::driftrl.trainer.RewardWarning"
)  # of JPEG's sizes, which are whole numbers
@pytest.mark.parametrize("loss", ["nft", *(pytest.param(x, marks=pytest.mark.slow) for x in ("awm", "dgpo"))])
def test_without_noise_a_loss_of_images_noised_anew_trains(settings, tmp_path, loss):
    config = settings(
        "sd3", sampling__noise_level=0.0, objective__loss=loss, objective__timesteps=1.0, iterations=1
    )
    (line,) = (Trainer(config, tmp_path / "run").run() / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["policy/grad_norm"] > 0


def test_names_what_a_folder_lacks(settings, folders, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folders["sd3"], broken)
    shutil.rmtree(broken / "transformer")
    with pytest.raises(InputError, match=r"model.path: .*broken lacks its transformer"):
        build_policy(settings("sd3", model__path=str(broken)))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_attention_is_computed_by_sdpa(settings, family, dtype, monkeypatch):
    """Every attention layer of the network calls it, and nothing else multiplies queries and keys."""
    policy = build_policy(settings(family, model__dtype=dtype))
    conditioning, calls, own = policy.encode(PROMPTS), [], torch.nn.functional.scaled_dot_product_attention

    def counted(*arguments, **named):
        calls.append(1)
        return own(*arguments, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    with torch.no_grad():
        score_step(policy, torch.zeros(2, *policy.latent_shape), torch.zeros(2, dtype=torch.long), conditioning, None,
                   PromptNoise())  # fmt: skip
    queries = (".to_q", ".to_qkv_mlp_proj")
    layers = {name.rpartition(".")[0] for name, _ in policy.network.named_modules() if name.endswith(queries)}
    if family == "sana":  # whose attention within an image is linear
        layers = {name for name in layers if name.endswith("attn2")}
    assert len(calls) == len(layers) > 0


PART = "diffusion_pytorch_model.safetensors"


def without(path, name):
    weights = load_file(path)
    del weights[next(k for k in weights if k.endswith(name))]
    save_file(weights, path, {"format": "pt"})


def renamed(folder, old, new):
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace(old, new))


BROKEN = {
    "a weight of the UNet": (
        lambda d: without(d / "unet" / PART, "conv_in.weight"), r"unet holds [\d,]+ of the [\d,]+ numbers of a UNet"),
    "a weight of the autoencoder": (
        lambda d: without(d / "vae" / PART, "decoder.conv_in.bias"), r"vae holds [\d,]+ of the [\d,]+ numbers"),
    "weights of the text encoder": (
        lambda d: without(d / "text_encoder/model.safetensors", "final_layer_norm.weight"),
        r"text_encoder holds [\d,]+ of the [\d,]+ numbers of a CLIPTextModel: it is damaged"),
    "the end of a file": (
        lambda d: (d / "text_encoder/model.safetensors").write_bytes(b"x" * 100), r"cannot be loaded: .*header"),
    "the end of another": (lambda d: (d / "unet" / PART).write_bytes(b"x" * 100), r"cannot be loaded: Unable"),
    "the words": (
        lambda d: [f.unlink() for f in (d / "tokenizer").iterdir()], r"tokenizer: its tokenizer has no vocabulary"),
    "a second text encoder": (
        lambda d: renamed(d, "StableDiffusionPipeline", "StableDiffusionXLPipeline"),
        r"has no text_encoder_2, tokenizer_2, which a StableDiffusionXLPipeline needs"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.filterwarnings("ignore")  # what the libraries say of it
def test_a_folder_that_lacks(settings, folders, tmp_path, what):
    """Libraries would go on with random weights, or stop deep inside."""
    destroy, message = BROKEN[what]
    broken = tmp_path / "broken"
    shutil.copytree(folders["sd"], broken)
    destroy(broken)
    with pytest.raises(InputError, match=rf"model\.path: .*{message}"):
        build_policy(settings("sd", model__path=str(broken)))


def test_a_hub_that_cannot_be_reached_is_told_what_to_do(settings):
    with pytest.raises(
        InputError, match=r"model\.path: a/b cannot be loaded: .*hf download a/b --local-dir FOLDER"
    ):
        build_policy(settings("sd", model__path="a/b"))


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_tokenizer_that_needs_torchvision_is_told_so(settings, folders, tmp_path):
    """That of FLUX.2 [dev], as published."""
    folder = tmp_path / "flux2"
    shutil.copytree(folders["flux2"], folder)
    renamed(folder, "Qwen2AudioProcessor", "PixtralProcessor")
    with pytest.raises(InputError, match=r"model\.path: .* PixtralProcessor, .* pip install torchvision"):
        build_policy(settings("flux2", model__path=str(folder)))


def test_a_folder_without_what_no_policy_asks(settings, folders, tmp_path):
    """As published, but for the safety checker."""
    folder = tmp_path / "unchecked"
    shutil.copytree(folders["sd"], folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    policy = build_policy(settings("sd", model__path=str(folder)))
    assert policy.pipeline.safety_checker is None
    same = build_policy(settings("sd"))
    torch.testing.assert_close(policy.encode(PROMPTS).embeds, same.encode(PROMPTS).embeds)


@mostly("sd", "flux")
@pytest.mark.parametrize("mixed", [False, True])
def test_a_folder_of_half_precision_files(settings, folders, tmp_path, family, mixed):
    """Downloads often hold no others; or they do for some parts."""
    folder = tmp_path / "fp16"
    load_stock(folders[family], family).save_pretrained(folder, variant="fp16")
    assert not list(folder.glob("*/model.safetensors"))
    if mixed:
        (folder / "text_encoder/model.fp16.safetensors").rename(folder / "text_encoder/model.safetensors")
    policy, same = (build_policy(settings(family, model__path=str(f))) for f in (folder, folders[family]))
    ours, theirs = (rollout(p, p.encode(PROMPTS), KEYS, 2, 4).images for p in (policy, same))
    torch.testing.assert_close(ours, theirs)


OTHERS = {
    "sd": ("EDMEulerScheduler", {}, "whose noise follows no betas"),
    "sdxl": ("FlowMatchEulerDiscreteScheduler", {}, "whose noise follows no betas"),
    "sd2": ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "steps_offset": 1}, "predicts 'flow_prediction'"),
    "sd3": ("FlowMatchHeunDiscreteScheduler", {}, "expected a FlowMatchEulerDiscreteScheduler"),
    "flux": ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "expected a FlowMatchEulerDiscreteScheduler"),
}  # fmt: skip


@pytest.mark.parametrize("family", OTHERS)
def test_refuses_schedulers_of_another_noise(settings, folders, tmp_path, family):
    """What is read from them as if they were DDIM's or Euler's would be wrong, and nobody would see it."""
    import diffusers

    name, options, message = OTHERS[family]
    folder = tmp_path / "other"
    shutil.copytree(folders[family], folder)
    shutil.rmtree(folder / "scheduler")
    getattr(diffusers, name)(**options).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
    with pytest.raises(InputError, match=rf"model\.path: its scheduler .*{message}"):
        build_policy(settings(family, model__path=str(folder)))


def test_refuses_a_network_for_inpainting(settings, folders, tmp_path):
    from diffusers import UNet2DConditionModel

    folder = tmp_path / "inpainting"
    shutil.copytree(folders["sd"], folder)
    config = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config({**config, "in_channels": 9}).save_pretrained(folder / "unet")
    with pytest.raises(InputError, match=r"latents with 4 channels.*got 9 \(is it one for inpainting\?\)"):
        build_policy(settings("sd", model__path=str(folder)))


def test_the_network_computes_as_many_rows_as_estimated(settings, family):
    """Two a sample with guidance, one where it is distilled into the network."""
    policy, rows = build_policy(settings(family)), []
    policy.fast = None  # which has as many, and calls no hooks
    policy.network.register_forward_hook(lambda module, inputs, output: rows.append(len(output[0])))
    drawn = rollout(policy, policy.encode(PROMPTS), KEYS, 2, 4)
    assert rows == [4 * policy.branches] * 4
    assert policy.branches == 1 + (family not in BUILT_IN)
    assert drawn.images.shape[2:] == policy.image_shape


@mostly("sd", "sdxl", "flux", "qwen", "klein")
def test_a_prompt_longer_than_the_model_reads_is_said_once_in_our_words(settings, family, recwarn, capfd):
    """Not where only an encoder that reads less than another one is at its end."""
    policy = build_policy(settings(family))
    long = ["a cat", " ".join(["a cat and a dog"] * 200), " ".join(["a dog"] * 60)]
    capfd.readouterr()  # what loading said
    policy.encode(long)
    policy.encode(long)
    told = [str(one.message) for one in recwarn if one.category is LongPromptWarning]
    assert len(told) == 1 and re.match(r"[12] of 3 prompts (is|are) longer than the \d+ tokens", told[0])
    assert "'a cat and a dog" in told[0] and capfd.readouterr().err == ""
    policy = build_policy(settings(family))
    recwarn.clear()
    policy.encode(["a cat", "a dog"])
    assert not recwarn.list


def test_a_network_of_one_file_and_the_rest_of_a_folder(family, folders, tmp_path):
    """As FLUX's fine-tunes are published: the file has the network alone, here under diffusers' names."""
    whole = load_pipeline(ModelConfig(path=str(folders[family])))
    part = "unet" if family in DIFFUSION else "transformer"
    asked = {name: value * 1.5 for name, value in getattr(whole, part).state_dict().items()}
    save_file(asked, tmp_path / "tuned-turbo.safetensors")
    model = ModelConfig(path=str(tmp_path / "tuned-turbo.safetensors"), config=str(folders[family]))
    made = load_pipeline(model)
    assert type(made) is type(whole)
    for name, before in whole.components.items():
        if isinstance(before, torch.nn.Module):
            want = asked if name == part else before.state_dict()
            now = getattr(made, name).state_dict()
            assert now.keys() == want.keys() and all(torch.equal(now[k], v) for k, v in want.items())
