"""Cosine distances: against SciPy, the closed form against all pairs, near-duplicates, gradients."""

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist, pdist

from driftrl.checks import InputError
from driftrl.diversity.functional import mean_pairwise_distance, pairwise_distances


def _features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("n", "d"), [(2, 1), (2, 5), (7, 3), (40, 64)])
def test_equal_scipy(n, d):
    x = _features(n, d)
    np.testing.assert_allclose(pairwise_distances(x), cdist(x, x, "cosine"), atol=1e-14)
    assert float(mean_pairwise_distance(x)) == pytest.approx(pdist(x, "cosine").mean(), abs=1e-14)


def test_batches_of_groups_are_independent():
    x = _features(2, 3, 5, 4)
    distances = pairwise_distances(x)
    assert distances.shape == (2, 3, 5, 5)
    for i in range(2):
        for j in range(3):
            np.testing.assert_allclose(distances[i, j], cdist(x[i, j], x[i, j], "cosine"), atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_exactly_zero_on_the_diagonal_symmetric_and_never_negative(dtype):
    x = _features(4, 33, 20, dtype=torch.float64).to(dtype)
    x[:, 1:20] = x[:, :1] * torch.arange(1, 20)[:, None]
    distances = pairwise_distances(x)
    assert torch.equal(distances.diagonal(dim1=-2, dim2=-1), torch.zeros(4, 33, dtype=distances.dtype))
    assert torch.equal(distances, distances.mT)
    assert float(distances.min()) >= 0.0
    assert float(distances[:, :20, :20].max()) < {torch.float64: 1e-15, torch.float32: 1e-13}.get(dtype, 1e-4)
    assert distances.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_known_values():
    identical = torch.full((5, 3), 0.7)
    opposite = torch.tensor([[1.0, 2.0], [-2.0, -4.0]])
    assert float(mean_pairwise_distance(identical)) == pytest.approx(0.0, abs=1e-15)
    assert float(mean_pairwise_distance(torch.eye(6))) == pytest.approx(1.0, abs=1e-15)
    assert float(mean_pairwise_distance(opposite)) == pytest.approx(2.0, abs=1e-15)
    assert float(pairwise_distances(opposite)[0, 1]) == pytest.approx(2.0, abs=1e-6)


def test_mean_keeps_its_digits_for_nearly_identical_items():
    rows = [[1.0, 1e-7 * i, 3e-8 * (i % 3)] for i in range(6)]
    with mpmath.workdps(50):
        exact = [mpmath.matrix(row) / mpmath.norm(mpmath.matrix(row)) for row in rows]
        pairs = [1 - (exact[i].T * exact[j])[0] for i in range(6) for j in range(i)]
        expected = float(mpmath.fsum(pairs) / len(pairs))
    assert expected < 1e-12
    assert float(mean_pairwise_distance(torch.tensor(rows, dtype=torch.float64))) == pytest.approx(
        expected, rel=1e-6, abs=0.0
    )


@settings(deadline=None)
@given(seed=st.integers(0, 2**16), n=st.integers(2, 12), d=st.integers(1, 9), scale=st.floats(1e-3, 1e3))
def test_mean_is_the_mean_of_all_pairs_in_any_order_and_at_any_scale(seed, n, d, scale):
    x = _features(n, d, seed=seed)
    all_pairs = pairwise_distances(x).sum() / (n * (n - 1))
    shuffled = x[torch.randperm(n, generator=torch.Generator().manual_seed(seed))] * scale
    assert float(mean_pairwise_distance(x)) == pytest.approx(float(all_pairs), abs=1e-12)
    assert float(mean_pairwise_distance(shuffled)) == pytest.approx(float(all_pairs), abs=1e-12)


def test_gradients_are_those_of_finite_differences():
    x = _features(2, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(pairwise_distances, (x,))
    assert torch.autograd.gradcheck(mean_pairwise_distance, (x[0].detach().requires_grad_(),))


def test_gradient_of_identical_items_is_finite_and_reaches_float32():
    x = torch.ones(4, 3, requires_grad=True)
    (pairwise_distances(x).sum() + mean_pairwise_distance(x)).backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert bool(torch.isfinite(x.grad).all())


def test_autocast_does_not_touch_the_result():
    x = _features(9, 32, dtype=torch.float32)
    plain = pairwise_distances(x), mean_pairwise_distance(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = pairwise_distances(x), mean_pairwise_distance(x)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_directions_of_any_length(scale):
    """The squares of such rows over- or underflow."""
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]], dtype=torch.float64)
    far = x * torch.tensor([[1.0], [scale], [scale]], dtype=torch.float64)
    torch.testing.assert_close(pairwise_distances(far), pairwise_distances(x))


@pytest.mark.parametrize("measure", [pairwise_distances, mean_pairwise_distance])
@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.ones(1, 4), r"at least 2 items.*\[1, 4\]"),
        (torch.ones(0, 4), "at least 2 items"),
        (torch.ones(3, 0), "at least 1 feature"),
        (torch.ones(4), r"expected shape \[N, D\]; got \[4\]"),
        ([[1.0, 2.0], [3.0, 4.0]], "expected a tensor.*list"),
        (torch.tensor([[1.0, 2.0], [3.0, torch.nan]]), r"1 of 4 values are not finite, first at \(1, 1\)"),
        (torch.tensor([[1.0, 2.0], [torch.inf, 0.0]]), "not finite"),
        (torch.tensor([[1.0, 2.0], [0.0, 0.0]]), r"row at \(1,\) has length 0"),
        (torch.ones(3, 2, dtype=torch.complex64), "real features"),
    ],
)
def test_bad_input_is_refused(measure, features, message):
    with pytest.raises(InputError, match=message):
        measure(features)


def test_mean_takes_one_group_only():
    with pytest.raises(InputError, match=r"\[N, D\]; got \[2, 3, 4\]"):
        mean_pairwise_distance(torch.ones(2, 3, 4))
