"""Training along the gradient of the reward (adjoint matching, DRaFT): what is followed, against backpropagation written out, and that it learns."""

import pytest
import torch

from driftrl import Trainer
from driftrl.advantages import AdvantageRule
from driftrl.batches import BatchSize, MemoryWarning
from driftrl.build import GradientWarning, build_encoder, build_loop, build_policy
from driftrl.checkpoint import MEMORY
from driftrl.checks import InputError, NotFiniteError
from driftrl.diversity.functional import pairwise_distances
from driftrl.objectives.pathwise import AdjointMatching, DirectReward
from driftrl.pathwise import Worth, gradient_of_images, worth
from driftrl.rollout import PromptNoise, rollout, score_step
from driftrl.shaping import Shaping, group_diversity
from driftrl.update import Objective, update
from test_methods import assert_same, shift
from test_methods import metrics as lines
from test_nft import assert_batch_sizes_only_round, tensors
from test_training import brightness

SPEC = PromptNoise(0.3)
KEYS, PROMPTS = [(0, 3, 0), (0, 3, 1)], ["a cat", "a dog"]


def smooth(images, prompts):
    """A reward that torch computes throughout."""
    side = torch.linspace(-1, 1, images.shape[-1], device=images.device)
    return (side * images[:, 0]).mean((1, 2)) + images[:, 1].square().mean((1, 2))


def by_numpy(images, prompts):
    return torch.from_numpy(images.numpy().mean((1, 2, 3)))


NETWORK = torch.nn.Linear(1, 1)


def by_weights_alone(images, prompts):
    return NETWORK((images.detach() * 255).round().mean((1, 2, 3))[:, None])[:, 0]


def one_by_one(images, prompts):
    return [image.square().mean() for image in images]


def stepped(images, prompts):
    return (images * 255).round().mean((1, 2, 3))


def still(images, prompts):
    return images.detach().mean((1, 2, 3))


ADJOINT = {
    "objective__loss": "adjoint",
    "objective__adjoint_scale": 30.0,
    "reward": "test_reward_gradients:smooth",
    "optimizer__learning_rate": 0.01,
}
DRAFT = {
    "objective__loss": "draft",
    "objective__draft_steps": 2,
    "reward": "test_reward_gradients:smooth",
    "optimizer__learning_rate": 0.01,
}
BOTH = pytest.mark.parametrize(
    "settings", [pytest.param(ADJOINT, id="adjoint"), pytest.param(DRAFT, id="draft", marks=pytest.mark.slow)]
)


@pytest.fixture
def drawn(config):
    """A policy that has left the base model, what it is asked with, and 2 x 3 samples of it."""
    policy = build_policy(config())
    shift(policy, 0)
    conditioning = policy.encode(PROMPTS)
    return policy, conditioning, rollout(policy, conditioning, KEYS, 3, 4, SPEC)


def moved(policy, conditioning, drawn, x, step):
    """The transition of all six samples."""
    rows = conditioning.rows(torch.tensor([0, 0, 0, 1, 1, 1]))
    return score_step(policy, x, torch.full((6,), step), rows, drawn.prompt_noise.flatten(0, 1), SPEC)


def rewarded(policy, latents):
    """By diffusers' own autoencoder."""
    vae = policy.pipeline.vae
    return smooth((vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1), []).sum()


def learn(policy, conditioning, drawn, loss, size, gradient, **more):
    """The gradient of one optimiser step, by parameter; and its figures."""
    found = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            found.extend(p.grad.clone() for p in policy.parameters())

    stats = update(
        policy, Watched(policy.parameters(), lr=1.0), drawn.path(), torch.zeros(2, 3), conditioning,
        Objective(pathwise=loss, batch_size=size, max_grad_norm=1e9, **more), (4, 9), SPEC, gradient=gradient,
    )  # fmt: skip
    return found, stats


def pulled(policy, drawn, size=4):
    """The gradient of the plain sum of rewards, in the clean latents."""
    weigh = Worth(torch.ones(2, 3, 1), torch.zeros(2))
    given = drawn.latents[:, :, -1], drawn.images, PROMPTS, policy, smooth, None, Shaping(0.0), weigh
    return gradient_of_images(*given, BatchSize(size, "x"))


@pytest.mark.parametrize("size", [100, 4])
@pytest.mark.parametrize("steps", [1, 3])
def test_draft_is_backpropagation_through_the_last_steps(drawn, steps, size):
    """The chain is drawn again with the same noise, and differentiated as a whole."""
    policy, conditioning, samples = drawn
    path, total = samples.latents.flatten(0, 1), len(policy.timesteps)
    x = path[:, total - steps]
    for step in range(total - steps, total):
        move = moved(policy, conditioning, samples, x, step)
        with torch.no_grad():
            added = path[:, step + 1] - moved(policy, conditioning, samples, path[:, step], step).mean
        x = move.mean + added
    torch.testing.assert_close(x, path[:, -1], atol=1e-5, rtol=0)
    rewarded(policy, x).backward()
    expected = [-p.grad / (6 * steps) for p in policy.parameters()]
    policy.network.zero_grad()
    found, stats = learn(
        policy, conditioning, samples, DirectReward(steps), size, pulled(policy, samples, size)
    )
    assert stats.pairs == 6 * steps
    assert stats.ratio_deviation == pytest.approx(0, abs=1e-5)
    assert steps > 1 or stats.loss == pytest.approx(0, abs=1e-5)
    for own, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
    assert sum(float(p.norm()) for p in expected) > 0


@pytest.mark.parametrize("size", [100, 4])
def test_adjoint_matching_is_its_formula_with_the_base_model_s_jacobians(drawn, size):
    policy, conditioning, samples = drawn
    path, steps = samples.latents.flatten(0, 1), policy.scored.nonzero()[:, 0].tolist()
    total = torch.zeros(())
    for step in steps:
        with policy.reference():
            x = path[:, step + 1].detach().requires_grad_()
            end = x
            for later in range(step + 1, len(policy.timesteps)):
                move = moved(policy, conditioning, samples, end, later)
                here = moved(policy, conditioning, samples, path[:, later], later)
                end = move.mean + (path[:, later + 1] - here.mean).detach()
            (adjoint,) = torch.autograd.grad(rewarded(policy, end), x)
            base = moved(policy, conditioning, samples, path[:, step], step).mean.detach()
        move = moved(policy, conditioning, samples, path[:, step], step)
        control = (move.mean - base) / move.std
        total = total + 0.5 * (control - move.std * 7.0 * adjoint).square().sum()
    (total / (6 * len(steps))).backward()
    expected = [p.grad.clone() for p in policy.parameters()]
    policy.network.zero_grad()
    gradient = pulled(policy, samples, size)
    found, stats = learn(policy, conditioning, samples, AdjointMatching(7.0), size, gradient)
    assert stats.loss == pytest.approx(float(total.detach()) / (6 * len(steps)), rel=1e-4)
    assert stats.pairs == 6 * len(steps) < 6 * len(policy.timesteps)
    for own, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
    # Only the noisiest steps, though the gradient comes from the image.
    few, stats = learn(
        policy,
        conditioning,
        samples,
        AdjointMatching(7.0),
        size,
        gradient,
        timesteps=0.3,
        timestep_choice="noisiest",
    )
    assert stats.pairs == 6
    assert not torch.allclose(few[0], found[0])


@pytest.mark.parametrize("size", [100, 2])
@pytest.mark.parametrize("level", ["advantage", "reward"])
def test_what_is_followed_is_the_shaped_advantage_with_its_statistics_held(
    config, drawn, encoder_folder, level, size
):
    policy, _, samples = drawn
    encoder = build_encoder(str(encoder_folder), policy.device)
    latents = samples.latents[:, :, -1]
    weigh = Worth(torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0.7, 2.0]))

    def both(images, prompts):
        assert list(prompts) == [text for text in PROMPTS for _ in range(3)][: len(images)] or size == 2
        return torch.stack([smooth(images, prompts), images[:, 2].mean((1, 2))], 1)

    found = gradient_of_images(
        latents,
        samples.images,
        PROMPTS,
        policy,
        both,
        encoder,
        Shaping(0.5, level=level),
        weigh,
        BatchSize(size, "x"),
    )
    x = latents.clone().requires_grad_()
    vae = policy.pipeline.vae
    images = (vae.decode(x.flatten(0, 1) / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    pixels = encoder.preprocess(images)
    features = encoder.model(pixel_values=pixels).pooler_output.flatten(1).unflatten(0, (2, 3))
    scores = torch.stack([smooth(images, PROMPTS), images[:, 2].mean((1, 2))], 1).unflatten(0, (2, 3))
    total = (weigh.reward * scores).sum() + (
        weigh.bonus[:, None] * group_diversity(pairwise_distances(features))
    ).sum()
    total.backward()
    torch.testing.assert_close(found, x.grad, rtol=1e-3, atol=1e-4 * float(x.grad.abs().max()))
    without = gradient_of_images(
        latents, samples.images, PROMPTS, policy, both, encoder, Shaping(0.0), weigh, BatchSize(size, "x")
    )
    assert (found - without).abs().max() > 1e-2 * found.abs().max()


ALONE = DRAFT | {"shaping__ratio": 0.0, "selection__strategy": "random", "selection__keep": 6}
"""Of the reward alone, and no candidate goes; in an order of the selection's own."""


@pytest.mark.parametrize(
    "settings",
    [
        ALONE | {"objective__kl_weight": 0.1},
        ALONE | {"advantage__scale": "none", "sampling__batch_size": 4},
        pytest.param(ADJOINT | {"shaping__ratio": 0.0, "selection__keep": 6}, marks=pytest.mark.slow),
    ],
    ids=["draft", "batches", "adjoint"],
)
def test_followed_while_it_is_decoded_it_is_what_is_followed_afterwards(
    config, tmp_path, monkeypatch, settings
):
    """And images are decoded and scored once, not twice."""
    found = {}
    for at_once in (True, False):
        loop, decoded, scored = build_loop(config(**settings), tmp_path), [], []
        loop.gradient_batch = BatchSize(5, "x")
        assert loop.follows_at_once
        if not at_once:
            monkeypatch.setattr(type(loop), "follows_at_once", False)
        decode, reward = loop.policy.decode, loop.reward
        loop.policy.decode = lambda x, decode=decode, seen=decoded: (seen.append(len(x)), decode(x))[1]
        loop.reward = lambda i, p, reward=reward, seen=scored: (seen.append(len(i)), reward(i, p))[1]
        done = loop.iterate()
        assert sum(decoded) == sum(scored) == 18 * (1 if at_once else 2)
        found[at_once] = done, [p.detach().clone() for p in loop.policy.parameters()], loop
    (one, ours, loop), (two, theirs, _) = found[True], found[False]
    assert torch.equal(one.images, two.images)
    for name in ("reward/mean", "advantage/abs_mean", "policy/grad_norm", "loss"):
        assert one.metrics[name] == pytest.approx(two.metrics[name], rel=1e-4, abs=1e-6), name
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert all(p.grad is None for p in loop.policy.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"shaping__ratio": 0.2},
        {"selection__keep": 4},
        {"sampling__overlap_reward": True},
        {"reward": [{"name": "test_reward_gradients:smooth", "weight": 1.0}]},
    ],
)
def test_where_more_is_followed_or_less_is_kept_it_waits(config, tmp_path, changes):
    loop = build_loop(config(**ALONE | changes), tmp_path)
    assert not loop.follows_at_once
    assert loop.iterate().metrics["policy/grad_norm"] > 0


def test_memory_that_does_not_suffice_on_the_way(config, tmp_path):
    """Half of the images at once, the gradient the same; latents that are not finite end the iteration before a reward sees them."""
    loop = build_loop(config(**ALONE), tmp_path)
    start, whole = [p.detach().clone() for p in loop.policy.parameters()], loop.iterate()
    with torch.no_grad():
        for parameter, value in zip(loop.policy.parameters(), start, strict=True):
            parameter.copy_(value)
    again, decode, seen = build_loop(config(**ALONE), tmp_path), loop.policy.decode, []

    def small(latents):
        seen.append(len(latents))
        if len(latents) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(latents)

    again.policy.decode = small
    with pytest.warns(MemoryWarning, match=r"objective\.loss: images at once, 64: it is 4"):
        part = again.iterate()
    assert seen == [18, 18, 16, 8, 4, 4, 4, 4, 2]
    assert part.metrics["policy/grad_norm"] == pytest.approx(whole.metrics["policy/grad_norm"], rel=1e-4)

    def broken(latents, steps, conditioning):
        move = transition(latents, steps, conditioning)
        move.mean[1] = torch.nan
        return move

    def strict(images, prompts):
        raise AssertionError("asked")

    transition, again.policy.transition = again.policy.transition, broken
    again.policy.decode, again.reward = decode, strict
    with pytest.raises(NotFiniteError, match=r"a latent is not finite for 'a .*', candidate 1"):
        again.iterate()


@pytest.mark.parametrize(
    "settings",
    [
        {"model__gradient_checkpointing": True},
        {"adapter__kind": "full"},
        pytest.param(
            {"adapter__kind": "full", "model__gradient_checkpointing": True}, marks=pytest.mark.slow
        ),
    ],
    ids=["checkpointed", "full", "both"],
)
def test_an_encoder_that_is_the_base_model_is_followed_through_the_base_model(config, settings):
    """Wherever training has led: a backward pass that asks for weights, or computes activations again, finds those of the base model."""
    policy, found = build_policy(config(**settings)), []
    encoder = build_encoder("policy:mid-block", policy.device, policy)
    latents = torch.randn(1, 3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    given = latents, policy.decode(latents[0])[None], PROMPTS[:1], policy, smooth, encoder, Shaping(0.5)
    weigh = Worth(torch.zeros(1, 3, 1), torch.ones(1))
    for seed in (None, 1):
        if seed is not None:
            shift(policy, seed)
        found.append(gradient_of_images(*given, weigh, BatchSize(8, "x")))
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4 * float(found[0].abs().max()))


@pytest.mark.parametrize(("rule", "expected"), [
    (AdvantageRule(scale="none"), 1.0), (AdvantageRule(scale="candidates"), 0.5), (AdvantageRule(scale="global"), 0.5),
    (AdvantageRule(scale="selected"), 0.0),
])  # fmt: skip
def test_a_unit_of_reward_is_worth_the_same_where_rewards_are_equal(rule, expected):
    """Unless it is their own spread that divides; the two candidates that go have 5 and 9."""
    rewards, chosen = torch.tensor([[7.0, 7.0, 5.0, 9.0] * 2]), torch.tensor([[0, 1, 4, 5]])
    rewards = torch.cat([rewards[:, :4], torch.tensor([[7.0, 7.0, 3.0, 11.0]])], 1)
    spread = float(rewards.std(correction=0))
    weigh = worth(rewards, rewards, chosen, torch.zeros(1, 4), rule, Shaping(0.0))
    wanted = 1 / spread if expected == 0.5 else expected
    torch.testing.assert_close(weigh.reward, torch.full((1, 4, 1), wanted))


def test_in_half_precision_the_unit_of_the_reward_does_not_matter(config, drawn):
    """A mean over many pixels has gradients that float16 has no numbers for, large rewards such as overflow."""
    policy = build_policy(config(model__dtype="float16"))
    shift(policy, 0)
    policy.pipeline.vae.to(torch.float16)
    conditioning = policy.encode(PROMPTS)
    samples = rollout(policy, conditioning, KEYS, 3, 4, SPEC)
    steps = {}
    for unit in (1.0, 1e-6, 1e5):
        weigh = Worth(torch.full((2, 3, 1), unit), torch.zeros(2))
        given = samples.latents[:, :, -1], samples.images, PROMPTS, policy, smooth, None, Shaping(0.0), weigh
        gradient = gradient_of_images(*given, BatchSize(4, "x")) / unit
        found, _ = learn(
            policy, conditioning, samples, DirectReward(2), 6, gradient * unit, loss_scale=2.0**14
        )
        steps[unit] = gradient, torch.cat([g.flatten() for g in found]) / unit
    for unit in (1e-6, 1e5):
        for one, other in zip(steps[unit], steps[1.0], strict=True):
            assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.9999
            assert float(one.norm() / other.norm()) == pytest.approx(1, rel=1e-2)


@pytest.mark.filterwarnings("ignore::driftrl.build.GuidanceWarning")
def test_learning_happens(config, tmp_path):
    """DRaFT goes on, adjoint matching to where its scale says: the same prompts and noise, so that the last iterations can be compared."""
    settings = {
        "iterations": 8, "sampling__guidance_scale": 1.0, "shaping__ratio": 0.0, "advantage__scale": "none",
        "logging__checkpoint_every": 100, "adapter__rank": 4, "optimizer__updates": 1,
    }  # fmt: skip
    ends = {}
    for name, own in {
        "draft": DRAFT,
        "far": ADJOINT | {"objective__adjoint_scale": 100.0},
        "near": ADJOINT | {"objective__adjoint_scale": 10.0},
    }.items():
        loop, rewards = build_loop(config(**settings | own), tmp_path / name), []
        loop.reward = brightness
        loop.run(8, lambda iteration, rewards=rewards: rewards.append(iteration.metrics["reward/mean"]))
        ends[name] = rewards[-1]
    assert min(ends["draft"], ends["far"]) - ends["near"] > 0.04, ends


def test_a_divergence_where_no_step_has_noise_is_refused(config, tmp_path):
    with pytest.raises(
        InputError, match=r"objective\.kl_weight: .* the last 1 of this model's denoising steps has none"
    ):
        build_loop(config(**DRAFT | {"objective__draft_steps": 1}, objective__kl_weight=0.1), tmp_path)


@BOTH
def test_batch_sizes_change_nothing_but_rounding(config, tmp_path, settings):
    assert_batch_sizes_only_round(config, tmp_path, settings | {"iterations": 2}, rel=1e-3, abs=1e-5)


@BOTH
def test_resumed_equals_uninterrupted(config, tmp_path, settings):
    whole = Trainer(config(**settings, iterations=3), tmp_path / "whole").run()
    for stop in (1, 3):
        parts = Trainer(config(**settings, iterations=stop), tmp_path / "parts", resume=stop > 1).run()
    for name in ("training.safetensors", MEMORY):
        if (whole / "checkpoints/000003" / name).is_file():
            assert_same(*(tensors(run, 3, name) for run in (whole, parts)))
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()


def test_a_divergence_holds_where_there_is_noise(config, tmp_path):
    """Of DRaFT's two steps the last has none."""
    run = Trainer(config(**DRAFT, iterations=3, objective__kl_weight=0.5), tmp_path / "run").run()
    found = lines(run)
    assert all(line["loss/kl"] >= 0 for line in found) and found[-1]["loss/kl"] > 0
    assert found[-1]["loss"] != found[-1]["loss/surrogate"]


def test_without_noise_draft_learns(config, tmp_path):
    run = Trainer(config(**DRAFT, iterations=1, sampling__eta=0.0), tmp_path / "run").run()
    assert lines(run)[0]["policy/grad_norm"] > 0
    with pytest.raises(InputError, match=r"sampling\.eta: expected more than 0"):
        config(**ADJOINT, sampling__eta=0.0)


def test_a_gradient_that_is_not_finite_skips_the_iteration(config, tmp_path):
    loop = build_loop(config(**DRAFT), tmp_path)
    loop.reward = lambda images, prompts: (images.mean((1, 2, 3)) * 0).sqrt() + smooth(images, prompts)
    with pytest.raises(
        NotFiniteError, match=r"a gradient of reward and diversity is not finite for 'a .*', candidate 0"
    ):
        loop.iterate()


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (
            "incompressibility",
            "reward incompressibility is not differentiable in the images, and objective.loss 'draft'",
        ),
        (
            "test_reward_gradients:by_numpy",
            "reward test_reward_gradients:by_numpy is not differentiable .*numpy",
        ),
        (
            "test_reward_gradients:still",
            "reward test_reward_gradients:still is not differentiable .*such as clipped_surrogate$",
        ),
        (
            ["test_reward_gradients:smooth", "test_reward_gradients:still"],
            "reward test_reward_gradients:still is not differentiable",
        ),
        (
            "test_reward_gradients:by_weights_alone",
            "reward test_reward_gradients:by_weights_alone is not differentiable in the images",
        ),
    ],
)
def test_rewards_without_a_gradient_are_refused_before_anything_is_drawn(config, tmp_path, reward, says):
    with pytest.raises(InputError, match=says):
        build_loop(config(**DRAFT | {"reward": reward}), tmp_path)


def test_a_reward_that_is_only_logged_needs_no_gradient(config, tmp_path):
    parts = [
        {"name": "test_reward_gradients:smooth", "weight": 1.0},
        {"name": "incompressibility", "weight": 0.0},
    ]
    loop = build_loop(config(**DRAFT | {"reward": parts}), tmp_path)
    figures = loop.iterate().metrics
    assert figures["policy/grad_norm"] > 0 and figures["reward/incompressibility/mean"] > 0


@pytest.mark.filterwarnings("ignore::driftrl.trainer.RewardWarning")
def test_images_that_a_reward_gives_a_constant_have_no_gradient(config, tmp_path):
    """And the run goes on with the others."""
    for settings in (ALONE, DRAFT):
        loop = build_loop(config(**settings), tmp_path)
        loop.reward = lambda images, prompts: (
            smooth(images, prompts) if "cow" in prompts else torch.zeros(len(images))
        )
        assert loop.iterate().metrics["policy/grad_norm"] >= 0


def test_a_list_of_numbers_of_torch_keeps_its_gradient(config, tmp_path):
    loop = build_loop(config(**DRAFT | {"reward": "test_reward_gradients:one_by_one"}), tmp_path)
    assert loop.iterate().metrics["policy/grad_norm"] > 0


def test_a_reward_whose_gradient_is_nothing_is_said(config, tmp_path):
    with pytest.warns(GradientWarning, match="stepped has a gradient of 0 at an image of noise"):
        build_loop(config(**DRAFT | {"reward": "test_reward_gradients:stepped"}), tmp_path)


def test_adjoint_matching_says_what_noise_it_wants(config, tmp_path):
    with pytest.warns(
        GradientWarning, match=r"independent of where it began: sampling\.eta 1 and no sampling\.window\. "
    ):
        build_loop(config(**ADJOINT, sampling__eta=0.5, sampling__window=1), tmp_path)


def blind(images):
    return images.detach().flatten(1)


def test_an_encoder_without_a_gradient_is_refused_where_it_shapes(config, tmp_path):
    settings = DRAFT | {"shaping__encoder": "test_reward_gradients:blind"}
    with pytest.raises(
        InputError, match=r"shaping\.encoder test_reward_gradients:blind is not differentiable"
    ):
        build_loop(config(**settings), tmp_path)
    build_loop(config(**settings, shaping__ratio=0.0), tmp_path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"adapter__shard": True, "adapter__kind": "full"}, r"adapter\.shard: does not go with objective\.loss 'draft', which takes gradients"),
        ({"shaping__potential": "stepwise"}, r"objective\.loss 'draft' learns from the picture alone"),
        ({"shaping__level": "multiply"}, r"shaping\.level: 'multiply' weighs samples"),
        ({"shaping__measure": "clusters", "shaping__level": "reward"}, r"shaping\.measure: the sizes of clusters have no gradient"),
        ({"objective__trust_region": "normalized"}, r"objective\.loss 'draft' is held by objective\.kl_weight"),
        ({"objective__draft_steps": 9}, r"objective\.draft_steps: expected at most sampling\.steps \(4\); got 9"),
        ({"reward": "http://127.0.0.1:1"}, r"reward: a server sends no gradient, which objective\.loss 'draft' follows"),
        ({"sampling__window": 1, "objective__kl_weight": 0.1}, r"objective\.kl_weight: .* sampling\.window"),
        ({"optimizer__one_pass": True, "optimizer__updates": 1}, None),
    ],
)  # fmt: skip
def test_what_does_not_go_with_it_is_refused(config, tmp_path, settings, says):
    if says is None:
        with pytest.raises(
            InputError, match=r"optimizer\.one_pass: objective\.loss must be clipped_surrogate: .*follow"
        ):
            build_loop(config(**DRAFT | settings), tmp_path)
        return
    with pytest.raises(InputError, match=says):
        config(**DRAFT | settings)
