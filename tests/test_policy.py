"""Rollout and replay through one kernel; the stock pipeline draws the same."""

import pytest
import torch

from driftrl import noise
from driftrl.build import build_policy
from driftrl.checks import InputError
from driftrl.evaluation.generate import generate
from driftrl.rollout import PromptNoise, rollout, score_step
from driftrl.transitions import gaussian

PROMPTS = ["a cat", "a dog"]
KEYS = [(0, 3, 0), (0, 3, 1)]


def replayed(policy, conditioning, drawn, spec, batch):
    """Log-probabilities of every scored step, replayed in batches of another size."""
    latents = drawn.latents.flatten(0, 1)
    eps = None if drawn.prompt_noise is None else drawn.prompt_noise.flatten(0, 1)
    rows = torch.arange(2).repeat_interleave(drawn.latents.shape[1])
    out = torch.zeros(latents.shape[0], latents.shape[1] - 1)
    for step in policy.scored.nonzero()[:, 0].tolist():
        for part in torch.arange(len(latents)).split(batch):
            at = torch.full((len(part),), step)
            own = None if eps is None else eps[part]
            move = score_step(policy, latents[part, step], at, conditioning.rows(rows[part]), own, spec)
            out[part, step] = gaussian.log_prob(latents[part, step + 1], move.mean, move.std)
    return out.unflatten(0, drawn.log_probs.shape[:2])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("eta", [0.0, 0.05])
@pytest.mark.parametrize("kind", ["v", "epsilon"])
def test_replay_of_an_untouched_policy_has_ratio_one(config, epsilon_folder, guidance, eta, kind):
    changes = {"model__path": str(epsilon_folder)} if kind == "epsilon" else {}
    policy = build_policy(config(sampling__guidance_scale=guidance, **changes))
    spec = PromptNoise(eta)
    conditioning = policy.encode(PROMPTS)
    drawn = rollout(policy, conditioning, KEYS, 5, 4, spec)
    with torch.no_grad():
        again = replayed(policy, conditioning, drawn, spec, 3)
    assert int(policy.scored.sum()) == (3 if kind == "v" else 4)
    assert (again - drawn.log_probs).abs().max() <= 1e-6


def test_prompt_noise_matters_to_the_score(config):
    policy = build_policy(config())
    conditioning = policy.encode(PROMPTS)
    drawn = rollout(policy, conditioning, KEYS, 3, 8, PromptNoise(0.5))
    with torch.no_grad():
        without = replayed(policy, conditioning, drawn, PromptNoise(0.0), 8)
    assert (without - drawn.log_probs).abs().max() > 1e-5


def test_samples_do_not_depend_on_the_batch_or_on_their_neighbours(config):
    policy = build_policy(config())
    conditioning = policy.encode(PROMPTS)
    together = rollout(policy, conditioning, KEYS, 6, 12)
    apart = rollout(policy, conditioning, KEYS, 4, 1)
    alone = rollout(policy, conditioning.rows(torch.tensor([1])), KEYS[1:], 4, 3)
    torch.testing.assert_close(together.images[:, :4], apart.images, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.images[1:, :4], alone.images, atol=1e-5, rtol=0)
    assert (together.images[0, 0] - together.images[0, 1]).abs().max() > 0.01


def test_the_way_to_an_image_need_not_be_kept(config):
    policy = build_policy(config())
    conditioning = policy.encode(PROMPTS)
    whole = rollout(policy, conditioning, KEYS, 3, 4)
    end = rollout(policy, conditioning, KEYS, 3, 4, keep_path=False)
    assert torch.equal(end.latents, whole.latents[:, :, -1:])
    assert torch.equal(end.images, whole.images) and torch.equal(end.log_probs, whole.log_probs)


def test_the_last_step_of_a_schedule_that_ends_clean_is_never_scored(config):
    policy = build_policy(config())
    drawn = rollout(policy, policy.encode(PROMPTS), KEYS, 2, 8)
    assert policy.scored.tolist() == [True, True, True, False]
    assert (drawn.log_probs[..., -1] == 0).all()
    assert (drawn.log_probs[..., :-1] != 0).all()


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_stock_pipeline_draws_the_same_images(config, guidance):
    """diffusers, given our generators, gives our images: sampling is theirs to the last detail."""
    settings = config(sampling__guidance_scale=guidance)
    policy = build_policy(settings, adapter=False)
    ours = rollout(policy, policy.encode(PROMPTS), KEYS, 2, 3).images.flatten(0, 1)
    generators = [noise.generator(*key, n, "latents") for key in KEYS for n in range(2)]
    theirs = policy.pipeline(
        [p for p in PROMPTS for _ in range(2)],
        num_inference_steps=4,
        guidance_scale=guidance,
        eta=1.0,
        generator=generators,
        output_type="pt",
    ).images
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_reference_is_the_base_model(config):
    policy = build_policy(config())
    conditioning = policy.encode(PROMPTS)
    base = rollout(policy, conditioning, KEYS, 2, 4).images
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3)
    tuned = rollout(policy, conditioning, KEYS, 2, 4).images
    with policy.reference():
        back = rollout(policy, conditioning, KEYS, 2, 4).images
    assert (tuned - base).abs().max() > 0.01
    torch.testing.assert_close(back, base, atol=1e-6, rtol=0)


def test_refuses_more_steps_than_the_model_was_trained_on(config):
    with pytest.raises(InputError, match=r"sampling.steps: expected at most 1000, .*; got 1001"):
        build_policy(config(sampling__steps=1001))


def test_a_global_precision_of_others_changes_nothing(config):
    def drawn():
        policy = build_policy(config())
        return generate(policy, "a cat", 2)

    expected = drawn()
    torch.set_default_dtype(torch.float64)
    try:
        found = drawn()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and found.shape == (1, 2, *expected.shape[2:])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_what_cannot_be_drawn_is_refused(config):
    policy = build_policy(config())
    for prompts, images in (([], 2), (["a cat"], 0)):
        with pytest.raises(InputError, match="generate: expected at least one prompt, and one image of each"):
            generate(policy, prompts, images)
