"""Vendi score: against eigenvalues computed otherwise, `vendi-score`, known sets, invariances, gradients."""

import math

import mpmath
import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from driftrl.checks import InputError
from driftrl.diversity.functional import vendi_score

ORDERS = [0.5, 1.0, 2.0, math.inf]


def _features(n: int, d: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + 0.3


def _hill_number(p: np.ndarray, q: float) -> float:
    p = p[p > 1e-13]
    if q == 1:
        return float(np.exp(-(p * np.log(p)).sum()))
    if math.isinf(q):
        return float(1 / p.max())
    return float((p**q).sum() ** (1 / (1 - q)))


def _primal(x: torch.Tensor) -> np.ndarray:
    kernel = 1.0 - scipy.spatial.distance.cdist(x.numpy(), x.numpy(), "cosine")
    return scipy.linalg.eigvalsh(kernel) / len(x)


def _dual(x: torch.Tensor) -> np.ndarray:
    z = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    return scipy.linalg.eigvalsh(np.einsum("nd,ne->de", z, z) / len(x))


@pytest.mark.parametrize("q", [0.0, 0.1, 0.999, *ORDERS, 1.001, 1.5, 7.0])
@pytest.mark.parametrize(("n", "d"), [(2, 3), (12, 5), (5, 12), (300, 40), (40, 300)])
def test_agrees_with_eigenvalues_of_either_form(n, d, q):
    x = _features(n, d)
    ours = float(vendi_score(x, q))
    assert ours == pytest.approx(_hill_number(_primal(x), q), rel=1e-6)
    assert ours == pytest.approx(_hill_number(_dual(x), q), rel=1e-6)


@pytest.mark.parametrize("q", [0.0, 0.5, 0.999, 1.0, 2.0, 50.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_identical_items_count_once_and_orthogonal_ones_each(q, dtype):
    identical = _features(1, 64).repeat(50, 1).to(dtype)
    orthogonal = torch.linalg.qr(_features(64, 64)).Q[:20] * torch.arange(1, 21)[:, None]
    pairs = torch.eye(8, dtype=dtype).repeat_interleave(2, dim=0)
    assert float(vendi_score(identical, q)) == pytest.approx(1.0, abs=1e-9)
    assert float(vendi_score(orthogonal, q)) == pytest.approx(20.0, abs=1e-9)
    assert float(vendi_score(pairs, q)) == pytest.approx(8.0, abs=1e-9)


def test_order_half_sees_neither_rounding_nor_loses_small_eigenvalues():
    rows = [[1.0, *(2e-9 if i == j else 0.0 for j in range(7))] for i in range(8)]
    with mpmath.workdps(60):
        z = mpmath.matrix(8, 8)
        for i, row in enumerate(rows):
            norm = mpmath.sqrt(mpmath.fsum(mpmath.mpf(value) ** 2 for value in row))
            for j, value in enumerate(row):
                z[i, j] = mpmath.mpf(value) / norm
        eigenvalues = mpmath.eigsy(z * z.T / 8, eigvals_only=True)
        roots = [mpmath.sqrt(value) for value in eigenvalues if value > mpmath.mpf(10) ** -40]
        expected = float(mpmath.fsum(roots) ** 2)
    excess = expected - 1.0
    assert 1e-9 < excess < 1e-7
    ours = float(vendi_score(torch.tensor(rows, dtype=torch.float64), 0.5))
    assert ours - 1.0 == pytest.approx(excess, rel=1e-4)


def test_nearly_order_one_continues_order_one():
    x = _features(30, 10)
    exact = float(vendi_score(x, 1.0))
    for step in (1e-4, 1e-6, 1e-7, 1e-9, 1e-12):
        assert float(vendi_score(x, 1.0 + step)) == pytest.approx(exact, abs=20 * step + 1e-6)
        assert float(vendi_score(x, 1.0 - step)) == pytest.approx(exact, abs=20 * step + 1e-6)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**16),
    n=st.integers(2, 15),
    d=st.integers(1, 10),
    q=st.one_of(st.floats(0.0, 20.0), st.just(math.inf)),
)
def test_invariant_to_order_scale_rotation_and_replication_and_within_its_range(seed, n, d, q):
    x = _features(n, d, seed=seed)
    score = float(vendi_score(x, q))
    generator = torch.Generator().manual_seed(seed)
    scaled = x * (0.1 + 10 * torch.rand(n, 1, generator=generator, dtype=torch.float64))
    rotated = x @ torch.linalg.qr(_features(d, d, seed=seed + 1)).Q
    tolerance = 1e-6 * score
    assert 1.0 - 1e-9 <= score <= min(n, d) + 1e-9
    assert float(vendi_score(x[torch.randperm(n, generator=generator)], q)) == pytest.approx(
        score, abs=tolerance
    )
    assert float(vendi_score(scaled, q)) == pytest.approx(score, abs=tolerance)
    assert float(vendi_score(rotated, q)) == pytest.approx(score, abs=tolerance)
    assert float(vendi_score(torch.cat([x, x, x]), q)) == pytest.approx(score, abs=tolerance)
    assert float(vendi_score(x, q + 0.5)) <= score + tolerance


@pytest.mark.parametrize("q", [0.3, *ORDERS, 3.0])
@pytest.mark.parametrize(("n", "d"), [(6, 4), (4, 6)])
def test_gradients_are_those_of_finite_differences(n, d, q):
    x = _features(n, d).requires_grad_()
    assert torch.autograd.gradcheck(lambda features: vendi_score(features, q), (x,))


@pytest.mark.parametrize("q", [0.0, *ORDERS])
@pytest.mark.parametrize("features", [torch.ones(6, 4), torch.eye(5), torch.eye(4).repeat(2, 1)])
def test_gradients_are_finite_where_eigenvalues_repeat_or_vanish(features, q):
    x = features.clone().requires_grad_()
    vendi_score(x, q).backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert bool(torch.isfinite(x.grad).all())


def test_ascending_the_gradient_raises_the_score():
    x = (torch.ones(6, 4, dtype=torch.float64) + 0.1 * _features(6, 4)).requires_grad_()
    before = vendi_score(x)
    before.backward()
    with torch.no_grad():
        after = vendi_score(x + 0.01 * x.grad / x.grad.norm())
    assert float(after) > float(before.detach()) + 1e-4


@pytest.mark.filterwarnings("ignore:Please import `csr_matrix`:DeprecationWarning")
@pytest.mark.parametrize(("n", "d"), [(80, 20), (20, 80)])
def test_agrees_with_the_published_package(n, d):
    published = pytest.importorskip("vendi_score.vendi")
    x = _features(n, d)
    kernel = 1.0 - scipy.spatial.distance.cdist(x.numpy(), x.numpy(), "cosine")
    assert float(vendi_score(x)) == pytest.approx(published.score_X(x.numpy()), rel=1e-6)
    for q in ORDERS:
        theirs = "inf" if math.isinf(q) else q
        assert float(vendi_score(x, q)) == pytest.approx(published.score_dual(x.numpy(), q=theirs), rel=1e-6)
        assert float(vendi_score(x, q)) == pytest.approx(published.score_K(kernel, q=theirs), rel=1e-6)


def test_autocast_does_not_touch_the_result():
    x = _features(20, 32).float()
    with torch.autocast("cpu", torch.bfloat16):
        cast = vendi_score(x)
    assert torch.equal(cast, vendi_score(x))


@pytest.mark.parametrize("q", [-0.5, -math.inf, math.nan, "two", "1", None, True])
def test_bad_order_is_refused(q):
    with pytest.raises(InputError, match=r"q: expected a number from 0 to infinity"):
        vendi_score(torch.eye(3), q)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.ones(1, 4), r"at least 2 items.*\[1, 4\]"),
        (torch.ones(2, 3, 4), r"expected shape \[N, D\]; got \[2, 3, 4\]"),
        (torch.tensor([[1.0, 2.0], [3.0, torch.nan]]), "1 of 4 values are not finite"),
        (torch.tensor([[1.0, 2.0], [0.0, 0.0]]), r"row at \(1,\) has length 0"),
    ],
)
def test_bad_input_is_refused(features, message):
    with pytest.raises(InputError, match=message):
        vendi_score(features)


@pytest.mark.parametrize("n", range(2, 20))
def test_order_zero_is_a_whole_number(n):
    features = torch.eye(n, requires_grad=True)
    score = vendi_score(features, q=0)
    assert score.item() == n
    score.backward()
    assert not features.grad.any()
