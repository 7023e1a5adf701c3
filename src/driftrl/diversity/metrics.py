"""The measures of `driftrl.diversity.functional` as metrics that take their features batch by batch.

They follow torchmetrics' interface (``update``, ``compute``, ``reset``). Where torchmetrics is installed they
are torchmetrics metrics, so that ``MetricCollection``, synchronisation between processes and the rest of it
apply; it is optional, and without it a small stand-in carries the same three methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from driftrl.checks import InputError, has_shape
from driftrl.diversity import functional


class PlainMetric(nn.Module):
    """The part of ``torchmetrics.Metric`` used here: named lists of tensors, which `reset` empties."""

    def __init__(self) -> None:
        super().__init__()
        self._lists: list[str] = []

    def add_state(self, name: str, default: list[Tensor], dist_reduce_fx: str | None = None) -> None:
        """Declare the attribute ``name`` as a list that `reset` empties; ``dist_reduce_fx`` is not used."""
        del dist_reduce_fx
        self._lists.append(name)
        setattr(self, name, list(default))

    def reset(self) -> None:
        """Forget all features."""
        for name in self._lists:
            setattr(self, name, [])


if TYPE_CHECKING:
    _Metric = PlainMetric
else:
    try:
        from torchmetrics import Metric as _Metric
    except ImportError:
        _Metric = PlainMetric


class _FeatureMetric(_Metric):
    """A measure of one set of features."""

    is_differentiable = True
    higher_is_better = True
    full_state_update = False

    features: list[Tensor]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_state("features", default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor) -> None:
        """Add a batch of features, [B, D], B >= 1."""
        self.features.append(_batch("features", features))


class MeanPairwiseDistance(_FeatureMetric):
    """Mean of 1 - cosine over all pairs of the features given; see `functional.mean_pairwise_distance`.

    On embeddings by CLIP this is CLIP diversity, by DreamSim DreamSim diversity.

    Args:
        settings: passed to ``torchmetrics.Metric`` where that is installed.

    Example:
        >>> metric = MeanPairwiseDistance()
        >>> metric.update(torch.eye(3)[:2])
        >>> metric.update(torch.eye(3)[2:])
        >>> round(float(metric.compute()), 6)
        1.0
    """

    def compute(self) -> Tensor:
        """Return the measure, float64.

        Raises:
            InputError: if fewer than two items were given, or as the function does.
        """
        return functional.mean_pairwise_distance(_joined("features", self.features))


class VendiScore(_FeatureMetric):
    """Effective number of different items among the features given; see `functional.vendi_score`.

    Args:
        q: order, from 0 to infinity.
        settings: passed to ``torchmetrics.Metric`` where that is installed.

    Example:
        >>> metric = VendiScore(q=2.0)
        >>> metric.update(torch.eye(3))
        >>> round(float(metric.compute()), 6)
        3.0
    """

    def __init__(self, q: float = 1.0, **settings: Any) -> None:
        super().__init__(**settings)
        self.q = q

    def compute(self) -> Tensor:
        """Return the score, float64.

        Raises:
            InputError: if fewer than two items were given, or as the function does.
        """
        return functional.vendi_score(_joined("features", self.features), q=self.q)


class ManifoldScores(_FeatureMetric):
    """Precision, recall, density and coverage against a reference set; see `functional.manifold`.

    ``update(features, reference=...)`` adds to both sets; either may be left out of a call, and their batches
    need not be of one size. In a ``MetricCollection`` the keyword ``reference`` reaches this metric alone.

    Args:
        k: neighbour whose distance is a ball's radius.
        settings: passed to ``torchmetrics.Metric`` where that is installed.

    Example:
        >>> metric = ManifoldScores(k=1)
        >>> metric.update(torch.arange(5.0)[:, None], reference=torch.arange(10.0)[:, None])
        >>> metric.compute()["recall"]
        tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable = False

    reference: list[Tensor]

    def __init__(self, k: int = 5, **settings: Any) -> None:
        super().__init__(**settings)
        self.k = k
        self.add_state("reference", default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor | None = None, reference: Tensor | None = None) -> None:
        """Add a batch to the generated set, ``features`` [B, D], to the ``reference`` [A, D], or to both."""
        if features is not None:
            self.features.append(_batch("features", features))
        if reference is not None:
            self.reference.append(_batch("reference", reference))

    def compute(self) -> dict[str, Tensor]:
        """Return the four measures by name, float64.

        Raises:
            InputError: if a set has too few items, or as the function does.
        """
        scores = functional.manifold(
            _joined("reference", self.reference), _joined("features", self.features), k=self.k
        )
        return {
            "precision": scores.precision,
            "recall": scores.recall,
            "density": scores.density,
            "coverage": scores.coverage,
        }


def _batch(name: str, features: Tensor) -> Tensor:
    return has_shape(name, features, "[B, D]")


def _joined(name: str, batches: list[Tensor] | Tensor) -> Tensor:
    """Return all batches as one tensor; after a synchronisation torchmetrics hands over a tensor already."""
    if isinstance(batches, Tensor):
        return batches
    if not batches:
        raise InputError(f"{name}: no features were given; call update before compute")
    if len({batch.shape[1] for batch in batches}) > 1:
        widths = ", ".join(str(width) for width in sorted({batch.shape[1] for batch in batches}))
        raise InputError(f"{name}: expected batches of one feature size; got {widths}")
    return torch.cat(list(batches))
