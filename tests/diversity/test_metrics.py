"""Metrics by batches: equal to the functions, with torchmetrics and without it, and inside its collection."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from driftrl.checks import InputError
from driftrl.diversity import functional, metrics


def _without_torchmetrics() -> ModuleType:
    """Import the module anew, as on a machine that lacks torchmetrics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchmetrics", None)
        spec = importlib.util.spec_from_file_location("metrics_without_torchmetrics", metrics.__file__)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


PLAIN = _without_torchmetrics()


@pytest.fixture(params=["plain", "torchmetrics"])
def module(request):
    if request.param == "plain":
        assert PLAIN._Metric is PLAIN.PlainMetric
        return PLAIN
    torchmetrics = pytest.importorskip("torchmetrics")
    assert issubclass(metrics.VendiScore, torchmetrics.Metric)
    return metrics


def _features(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


X, Y = _features(40), _features(30, seed=1)


def _expected() -> dict[str, torch.Tensor]:
    scores = functional.manifold(Y, X, k=3)
    return {
        "MeanPairwiseDistance": functional.mean_pairwise_distance(X),
        "VendiScore": functional.vendi_score(X, q=2.0),
        "precision": scores.precision,
        "recall": scores.recall,
        "density": scores.density,
        "coverage": scores.coverage,
    }


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [7, 13, 20]])
def test_batches_do_not_matter_and_reset_forgets(module, sizes):
    distance, vendi, manifold = (
        module.MeanPairwiseDistance(),
        module.VendiScore(q=2.0),
        module.ManifoldScores(k=3),
    )
    expected = _expected()
    for _ in range(2):
        for batch in X.split(sizes):
            distance.update(batch)
            vendi.update(batch)
            manifold.update(batch)
        for batch in Y.split(11):
            manifold.update(reference=batch)
        torch.testing.assert_close(distance.compute(), expected["MeanPairwiseDistance"])
        torch.testing.assert_close(vendi.compute(), expected["VendiScore"])
        for name, figure in manifold.compute().items():
            torch.testing.assert_close(figure, expected[name])
        for metric in (distance, vendi, manifold):
            metric.reset()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_bad_use_is_refused(module):
    metric = module.VendiScore()
    with pytest.raises(InputError, match=r"features: no features were given; call update"):
        metric.compute()
    with pytest.raises(InputError, match=r"features: expected shape \[B, D\]; got \[6\]"):
        metric.update(X[0])
    metric.reset()
    metric.update(X[:1])
    with pytest.raises(InputError, match="at least 2 items"):
        metric.compute()
    metric.update(torch.ones(2, 5))
    with pytest.raises(InputError, match="features: expected batches of one feature size; got 5, 6"):
        metric.compute()
    one_sided = module.ManifoldScores()
    one_sided.update(X)
    with pytest.raises(InputError, match="reference: no features were given"):
        one_sided.compute()


@pytest.mark.parametrize("compute_groups", [True, False])
def test_works_inside_a_metric_collection(compute_groups):
    torchmetrics = pytest.importorskip("torchmetrics")
    collection = torchmetrics.MetricCollection(
        [metrics.MeanPairwiseDistance(), metrics.VendiScore(q=2.0), metrics.ManifoldScores(k=3)],
        compute_groups=compute_groups,
    )
    for _ in range(2):
        for x, y in zip(X.split(10), Y.split(8), strict=True):
            collection.update(x, reference=y)
        figures = collection.compute()
        expected = _expected()
        assert figures.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(figures[name], expected[name])
        collection.reset()


def test_two_orders_in_one_collection_stay_apart():
    torchmetrics = pytest.importorskip("torchmetrics")
    collection = torchmetrics.MetricCollection(
        {
            "one": metrics.VendiScore(),
            "two": metrics.VendiScore(q=2.0),
            "mean": metrics.MeanPairwiseDistance(),
        }
    )
    collection.update(X[:20])
    collection.update(X[20:])
    figures = collection.compute()
    torch.testing.assert_close(figures["one"], functional.vendi_score(X))
    torch.testing.assert_close(figures["two"], functional.vendi_score(X, q=2.0))
    torch.testing.assert_close(figures["mean"], functional.mean_pairwise_distance(X))


def test_calling_a_torchmetrics_metric_gives_the_batch_and_keeps_the_total():
    pytest.importorskip("torchmetrics")
    metric = metrics.VendiScore()
    for batch in X.split(10):
        torch.testing.assert_close(metric(batch), functional.vendi_score(batch))
    torch.testing.assert_close(metric.compute(), functional.vendi_score(X))


def test_a_synchronised_state_is_understood():
    """After gathering from all processes torchmetrics leaves one tensor where the list was."""
    for module in (metrics, PLAIN):
        metric = module.VendiScore()
        metric.update(X[:20])
        metric.features = X
        torch.testing.assert_close(metric.compute(), functional.vendi_score(X))
