"""What every pure function makes of what is no tensor, and of whole and half-precision numbers."""

import numpy as np
import pytest
import torch

from driftrl import advantages, clusters, conditioning, mixture, selection, shaping
from driftrl.checks import InputError
from driftrl.diversity import functional
from driftrl.objectives import clipped_surrogate, gate, kl, negative_aware
from driftrl.transitions import ddim, flow_sde, gaussian

A, B, C = (torch.rand(2, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
ONE, TWO = torch.tensor([0.3, 0.4]), torch.tensor([0.6, 0.7])
EMBEDS = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(3))
DISTANCES = (1 - torch.eye(4)).expand(2, 4, 4) * torch.arange(1.0, 5.0)

CALLS = {
    selection.select: (A, 2),
    advantages.group_relative: (A,),
    advantages.constant_rewards: (A,),
    shaping.group_diversity: (DISTANCES,),
    shaping.nearest_distance: (DISTANCES,),
    shaping.entropy_share: (DISTANCES,),
    shaping.intrinsic_advantage: (A,),
    shaping.constant_diversity: (A,),
    shaping.shape_advantages: (A, B),
    shaping.shape_rewards: (A, B),
    shaping.reweight_above_average: (A, B),
    shaping.stepwise_intrinsic: (EMBEDS,),
    conditioning.annealed_noise: (EMBEDS, EMBEDS, 500, 0.05),
    gaussian.log_prob: (A, B, 1.0),
    gaussian.sample: (A, 1.0, B),
    ddim.ddim_transition: (A, B, ONE, TWO),
    ddim.ddim_noised: (A, B, ONE),
    flow_sde.flow_sde_transition: (A, B, TWO, ONE),
    flow_sde.dance_sde_transition: (A, B, TWO, ONE),
    flow_sde.cps_transition: (A, B, TWO, ONE),
    flow_sde.flow_noised: (A, B, ONE),
    clipped_surrogate.clipped_surrogate: (A[0], B[0], C[0]),
    kl.kl_equal_variance: (A, B, 1.0),
    kl.wasserstein_equal_variance: (A, B),
    gate.win_rates: (A,),
    gate.gate: (A, 0.5),
    negative_aware.negative_aware: (A, B, C, ONE),
    mixture.mixed: (EMBEDS, [mixture.Part(name) for name in "abcd"]),
    clusters.spectral_clusters: (DISTANCES, 2),
    functional.pairwise_distances: (A,),
    functional.vendi_score: (A,),
    functional.recall: (A, B, 1),
}
TIMES = ("t", "t_prev", "alpha_t", "alpha_prev")


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("otherwise", [torch.Tensor.tolist, torch.Tensor.numpy, lambda tensor: None, lambda tensor: tensor[0, 0] if tensor.dim() > 1 else tensor[0]],
                         ids=["list", "numpy", "none", "too few dimensions"])  # fmt: skip
def test_what_is_no_tensor_of_that_shape_is_refused(function, otherwise):
    """By one clear message, whichever argument it is."""
    given = CALLS[function]
    function(*given)
    names = function.__code__.co_varnames
    for place, value in enumerate(given):
        if isinstance(value, torch.Tensor) and names[place] not in TIMES:
            wrong = [otherwise(value) if n == place else other for n, other in enumerate(given)]
            with pytest.raises(InputError, match=r"expected"):
                function(*wrong)


@pytest.mark.parametrize(
    ("function", "whole", "others"),
    [
        (conditioning.annealed_noise, torch.full((1, 1, 2), 3), (torch.ones(1, 1, 2), 1000, 0.1)),
        (ddim.ddim_noised, torch.tensor([[3, 1]]), (torch.ones(1, 2), torch.tensor([0.25]))),
        (flow_sde.flow_noised, torch.tensor([[3, 1]]), (torch.ones(1, 2), torch.tensor([0.25]))),
        (gaussian.sample, torch.tensor([[3, 1]]), (0.5, torch.ones(1, 2))),
        (shaping.stepwise_intrinsic, torch.tensor([[[0, 2, 4]]]), (0.5,)),
    ],
    ids=["annealed_noise", "ddim_noised", "flow_noised", "sample", "stepwise_intrinsic"],
)
def test_whole_numbers_are_not_cut_off(function, whole, others):
    torch.testing.assert_close(function(whole, *others), function(whole.float(), *others))


def test_the_discount_of_whole_potentials():
    _, returns = shaping.stepwise_intrinsic(torch.tensor([[[0, 2, 4]]]), 0.5)
    assert returns.tolist() == [[[1.0, 0.0]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_reason_to_see_no_difference(dtype):
    """Spreads of some steps between neighbouring numbers are signal; equal numbers, each rounded on its own, are not."""
    rewards = torch.tensor([[20.0, 20.5, 21.0, 20.25]])
    diversity = torch.tensor([[0.25, 0.30, 0.35, 0.30]])
    for function, values in (
        (advantages.group_relative, rewards),
        (shaping.intrinsic_advantage, diversity),
    ):
        torch.testing.assert_close(function(values.to(dtype)).float(), function(values), atol=0.1, rtol=0)
    novelty = torch.tensor([[0.03, 0.05, 0.04, 0.04]])
    weighed = shaping.reweight_above_average(torch.ones(1, 4).to(dtype), novelty.to(dtype)).float()
    torch.testing.assert_close(weighed, novelty / 0.04, atol=0.02, rtol=0)
    alike = (torch.tensor([[20.0, 20.0, 20.0]]) + torch.tensor([0.0, 1e-6, -1e-6])).to(dtype)
    assert advantages.constant_rewards(alike).all() and not advantages.group_relative(alike).any()
    step = torch.finfo(dtype).eps * 16  # between neighbours at 20
    neighbours = torch.tensor([[20.0, 20.0, 20.0 + step]]).to(dtype)
    assert bool(advantages.constant_rewards(neighbours).all())


def test_rounding_is_that_of_the_coarser_numbers():
    """Candidates of float32 that differ by one step have no spread, though the rewards are float64."""
    rewards = torch.tensor([[1.0, 1.0, 1.0 + 1e-7]], dtype=torch.float64)
    candidates = torch.tensor([[1.0, 1.0 + 2**-23]])
    assert not advantages.group_relative(rewards, "candidates", candidates).any()
    assert advantages.group_relative(rewards, "candidates", candidates.double()).any()


@pytest.mark.filterwarnings("ignore")
def test_clusters_are_whole_and_finite():
    for distances, count in ((DISTANCES, 1.5), (DISTANCES * np.nan, 2)):
        with pytest.raises(InputError, match=r"whole number|not finite"):
            clusters.spectral_clusters(distances, count)


@pytest.mark.parametrize(
    "call",
    [
        lambda one: gaussian.log_prob(one, one, 1.0),
        lambda one: gaussian.sample(one, 1.0, one),
        lambda one: kl.kl_equal_variance(one, one, 1.0),
    ],
)
def test_a_single_number_is_refused_for_its_shape(call):
    """Not for having another one than itself."""
    with pytest.raises(InputError, match="expected at least one dimension; got a single number"):
        call(torch.tensor(1.0))
