"""Diversity of a set of features: pure functions of tensors."""

from driftrl.diversity.functional.manifold import Manifold, manifold, recall
from driftrl.diversity.functional.pairwise import mean_pairwise_distance, pairwise_distances
from driftrl.diversity.functional.vendi import vendi_score

__all__ = [
    "Manifold",
    "manifold",
    "mean_pairwise_distance",
    "pairwise_distances",
    "recall",
    "vendi_score",
]
