"""All candidates of a prompt from one initial latent, as DanceGRPO and MixGRPO draw them."""

import pytest
import torch
from safetensors.torch import load_file

from driftrl import Trainer
from driftrl.build import build_loop, build_policy
from driftrl.checks import InputError
from driftrl.rollout import rollout
from test_methods import assert_same


def test_a_prompts_candidates_begin_alike_and_end_apart(config):
    policy = build_policy(config())
    conditioning = policy.encode(["a cat", "a dog", "a cat"])
    keys, first = [(0, 3, 0), (0, 3, 1), (0, 3, 0)], [0, 0, 4]
    drawn, parts = (
        rollout(policy, conditioning, keys, 4, batch, first=first, same_latent=True) for batch in (12, 5)
    )
    begin, images = drawn.latents[:, :, 0], drawn.images.flatten(2)
    assert all(torch.equal(each, row[0]) for row in begin for each in row)
    # Also where one prompt comes twice.
    assert all((begin[a, 0] - begin[b, 0]).abs().max() > 0.5 for a, b in ((0, 1), (0, 2), (1, 2)))
    assert float(torch.cdist(images, images).flatten(1)[:, 1:4].min()) > 1e-3
    torch.testing.assert_close(parts.latents, drawn.latents)
    own = rollout(policy, conditioning, keys, 4, 12, first=first)
    assert (own.latents[:, 1:, 0] - own.latents[:, :1, 0]).abs().amax((2, 3, 4)).min() > 0.5


def test_a_run_learns_from_them_and_resumes(config, tmp_path):
    faint = {"prompt_noise__eta": 1e-6, "prompt_noise__similarity": "incompressibility"}
    metrics = build_loop(config(sampling__same_latent=True, **faint), tmp_path / "loop").iterate().metrics
    assert metrics["policy/ratio_deviation"] <= 1e-6
    # What is drawn again to see what prompt noise costs begins there too.
    again = metrics["prompt_noise/similarity_without"]
    assert metrics["prompt_noise/similarity"] == pytest.approx(again, rel=1e-4)
    whole = Trainer(config(sampling__same_latent=True, iterations=2), tmp_path / "whole").run()
    plain = Trainer(config(iterations=2), tmp_path / "plain").run()
    for stop in (1, 2):
        changes = {"sampling__same_latent": True, "iterations": stop}
        parts = Trainer(config(**changes), tmp_path / "parts", resume=stop > 1).run()
    a, b = (load_file(run / "checkpoints/000002/training.safetensors") for run in (whole, parts))
    assert_same(a, b)
    assert (whole / "metrics.jsonl").read_bytes() != (plain / "metrics.jsonl").read_bytes()


def test_without_noise_in_the_steps_they_would_be_one_image(config):
    nft = {"objective__loss": "nft", "objective__kl_weight": 0.0}
    with pytest.raises(
        InputError, match=r"sampling\.same_latent: with sampling\.eta 0 .* would be one image"
    ):
        config(**nft, sampling__same_latent=True, sampling__eta=0.0)
