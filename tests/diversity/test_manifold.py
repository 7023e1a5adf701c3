"""Precision, recall, density, coverage: against `prdc` and the definitions, dropped modes, invariances."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from driftrl.checks import InputError
from driftrl.diversity.functional import Manifold, manifold

MODULE = importlib.import_module(
    "driftrl.diversity.functional.manifold"
)  # the package's attribute: a function
FIELDS = ("precision", "recall", "density", "coverage")


def _features(n: int, d: int, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def _figures(scores: Manifold) -> list[float]:
    return [float(getattr(scores, field)) for field in FIELDS]


def _by_definition(x: torch.Tensor, y: torch.Tensor, k: int) -> list[float]:
    """Every ball and every pair written out; inside: d < r, or d = 0."""

    def squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return ((a[:, None, :] - b[None, :, :]) ** 2).sum(-1)

    def radii(a: np.ndarray) -> np.ndarray:
        distance = squared(a, a)
        np.fill_diagonal(distance, np.inf)
        return np.sort(distance, axis=1)[:, k - 1]

    x, y = x.double().numpy(), y.double().numpy()
    distance = squared(x, y)
    in_x = (distance < radii(x)[:, None]) | (distance == 0)
    in_y = (distance < radii(y)[None, :]) | (distance == 0)
    return [
        in_x.any(0).mean(),
        in_y.any(1).mean(),
        in_x.sum() / (k * len(y)),
        in_x.any(1).mean(),
    ]


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(
    ("m", "n", "d", "shift"), [(60, 60, 2, 0.5), (200, 150, 16, 0.2), (90, 250, 64, 1e3)]
)
def test_agrees_with_the_published_package(m, n, d, shift, k):
    published = pytest.importorskip("prdc")
    x, y = _features(m, d, seed=1, shift=shift), _features(n, d, seed=2, shift=shift + 0.3) * 0.999
    expected = published.compute_prdc(x.numpy(), y.numpy(), nearest_k=k)
    assert _figures(manifold(x, y, k)) == pytest.approx([expected[field] for field in FIELDS], abs=1e-12)


def test_agrees_with_the_published_package_on_a_set_against_itself():
    published = pytest.importorskip("prdc")
    x = _features(120, 8)
    expected = published.compute_prdc(x.numpy(), x.numpy(), nearest_k=5)
    assert _figures(manifold(x, x, 5)) == pytest.approx([expected[field] for field in FIELDS], abs=1e-12)
    assert expected["density"] == pytest.approx(1.0)  # a radius does not hold the neighbour that defines it


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**16),
    m=st.integers(4, 40),
    n=st.integers(4, 40),
    d=st.integers(1, 3),
    k=st.integers(1, 3),
)
def test_follows_the_definition_with_ties_and_duplicates(seed, m, n, d, k):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (m, d), generator=generator).float()
    y = torch.randint(-2, 3, (n, d), generator=generator).float()
    assert _figures(manifold(x, y, k)) == pytest.approx(_by_definition(x, y, k), abs=1e-12)


@settings(deadline=None)
@given(seed=st.integers(0, 2**16), copies=st.integers(1, 9), k=st.integers(1, 4))
def test_every_set_recalls_itself_even_in_copies(seed, copies, k):
    x = _features(6, 5, seed=seed).repeat(copies, 1)
    scores = manifold(x, x, k)
    assert float(scores.recall) == float(scores.precision) == float(scores.coverage) == 1.0


def test_collapsed_set_recalls_next_to_nothing():
    reference = _features(400, 16)
    one_picture = reference[:1] + 1e-3 * _features(400, 16, seed=1)
    assert float(manifold(reference, one_picture).recall) < 0.01
    assert float(manifold(reference, reference[:1].repeat(400, 1)).recall) == pytest.approx(1 / 400)
    assert float(manifold(reference, one_picture).precision) > 0.9


def test_recall_and_coverage_fall_with_every_mode_dropped():
    modes, each = 8, 40
    centres = 20.0 * torch.eye(modes, 12, dtype=torch.float64).repeat_interleave(each, dim=0)
    reference = centres + _features(modes * each, 12, seed=1)
    generated = centres + _features(modes * each, 12, seed=2)
    scores = [manifold(reference, generated[: kept * each]) for kept in range(modes, 0, -1)]
    for field in ("recall", "coverage"):
        figures = [float(getattr(score, field)) for score in scores]
        drops = -np.diff(figures)
        assert figures[0] > 0.6
        assert bool((drops > 0.5 * figures[0] / modes).all()), figures
        assert figures[-1] < 1.2 * figures[0] / modes
    assert min(float(score.precision) for score in scores) > 0.6


@pytest.mark.parametrize("integers", [False, True])
def test_neither_order_nor_blocks_change_anything(monkeypatch, integers):
    x, y = _features(70, 6), _features(55, 6, seed=1, shift=0.2)
    if integers:  # ties everywhere
        x, y = x.round(), y.round()
    whole = _figures(manifold(x, y))
    generator = torch.Generator().manual_seed(3)
    shuffled = manifold(
        x[torch.randperm(70, generator=generator)], y[torch.randperm(55, generator=generator)]
    )
    assert _figures(shuffled) == whole
    for block, pairs in ((1, 1), (7, 40), (64, 2**20)):
        monkeypatch.setattr(MODULE, "BLOCK", block)
        monkeypatch.setattr(MODULE, "PAIRS", pairs)
        assert _figures(manifold(x, y)) == whole


@pytest.mark.parametrize("offset", [0.0, 1e8])
@pytest.mark.parametrize("scale", [2.0**-560, 1.0, 2.0**560])
def test_distant_origin_and_extreme_scales_change_nothing(offset, scale):
    x, y = _features(80, 4) + offset, _features(70, 4, seed=1, shift=0.3) + offset
    assert _figures(manifold(x * scale, y * scale)) == pytest.approx(_by_definition(x, y, 5), abs=1e-12)


def test_rounding_between_distant_clusters_does_not_mix_up_neighbours_within_them():
    # neighbours at squared distances of 1e-2, which the squares of 1e16 leave no digit of
    apart = 1e8 * torch.tensor([[-1.0], [1.0]], dtype=torch.float64).repeat_interleave(150, dim=0)
    x, y = _features(300, 2) + apart, _features(300, 2, seed=1) + apart
    assert _figures(manifold(x, y)) == pytest.approx(_by_definition(x, y, 5), abs=1e-12)
    assert _figures(manifold(x, x)) == pytest.approx(_by_definition(x, x, 5), abs=1e-12)


def test_single_precision_features_get_double_precision_distances():
    x, y = (_features(300, 512, seed=seed, shift=30.0).float() for seed in (0, 1))
    assert _figures(manifold(x, y)) == pytest.approx(_by_definition(x, y, 5), abs=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        cast = _figures(manifold(x, y))
    assert cast == _figures(manifold(x, y))


def test_result_is_frozen_scalars():
    scores = manifold(_features(9, 2), _features(8, 2, seed=1), k=2)
    assert all(getattr(scores, field).shape == () for field in FIELDS)
    assert all(getattr(scores, field).dtype == torch.float64 for field in FIELDS)
    with pytest.raises(AttributeError):
        scores.recall = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("reference", "generated", "k", "message"),
    [
        (torch.ones(1, 4), torch.ones(9, 4), 1, r"reference: expected at least 2 items.*\[1, 4\]"),
        (torch.ones(9, 4), torch.ones(1, 4), 1, r"generated: expected at least 2 items"),
        (torch.ones(9, 4), torch.ones(9, 3), 1, "as many features per item as reference, 4; got 3"),
        (torch.ones(9), torch.ones(9, 3), 1, r"reference: expected shape \[N, D\]; got \[9\]"),
        (torch.full((9, 4), torch.nan), torch.ones(9, 4), 1, "reference: 36 of 36 values are not finite"),
        (torch.ones(9, 4), torch.full((9, 4), torch.inf), 1, "generated: 36 of 36 values are not finite"),
        (torch.ones(9, 4), torch.ones(99, 4), 9, "fewer than the items of reference, which are 9"),
        (torch.ones(99, 4), torch.ones(9, 4), 9, "fewer than the items of generated, which are 9"),
        (torch.ones(9, 4), torch.ones(9, 4), 0, "k: expected a whole number of at least 1; got 0"),
        (torch.ones(9, 4), torch.ones(9, 4), 2.0, "k: expected a whole number"),
    ],
)
def test_bad_input_is_refused(reference, generated, k, message):
    with pytest.raises(InputError, match=message):
        manifold(reference, generated, k)


def _rise_in_peak_memory(statements: str) -> float:
    """Run ``measure`` on features ``x`` and ``y`` in a fresh process; GiB beyond the features."""
    script = f"""
import json, resource, torch
from driftrl.diversity import functional as F
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
generator = torch.Generator().manual_seed(0)
{statements}
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(out.stdout) / (1 if sys.platform == "darwin" else 2**-10) / 2**30


SMALL = """
x = torch.randn(16_000, 8, generator=generator)
F.manifold(x[:100], x[100:200])
before = peak()
F.manifold(x, x)
print(json.dumps(peak() - before))
"""

MANY_NEIGHBOURS = """
x = torch.randn(2_000, 512, generator=generator)
F.manifold(x[:100], x[100:200])
before = peak()
F.manifold(x, x, k=100)
print(json.dumps(peak() - before))
"""

LARGE = """
x = torch.randn(100_000, 512, generator=generator)
y = torch.randn(100_000, 512, generator=generator)
before = peak()
F.{call}
print(json.dumps(peak() - before))
"""


def test_memory_does_not_grow_with_the_number_of_pairs():
    assert _rise_in_peak_memory(SMALL) < 0.25  # all pairs: 1.9 GiB


def test_memory_does_not_grow_with_the_neighbours_that_are_measured_again():
    assert _rise_in_peak_memory(MANY_NEIGHBOURS) < 0.15  # all of them at once: 0.8 GiB


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "call", ["manifold(x, y)", "vendi_score(x)", "vendi_score(x, 0.5)", "mean_pairwise_distance(x)"]
)
def test_a_hundred_thousand_features_fit_in_4_gib(call):
    assert _rise_in_peak_memory(LARGE.format(call=call)) < 4.0
