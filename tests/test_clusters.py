"""Spectral clusters: planted ones are found, as scikit-learn finds them; nothing depends on the order."""

import numpy as np
import pytest
import torch

from driftrl.checks import InputError
from driftrl.clusters import cluster_sizes, spectral_clusters


def together(labels):
    return labels[..., :, None] == labels[..., None, :]


def planted(sizes, seed, spread=0.05):
    """Unit features around orthogonal directions, and their distances 1 - cosine."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.eye(8, dtype=torch.float64)[: len(sizes)]
    truth = torch.cat([torch.full((n,), i) for i, n in enumerate(sizes)])
    truth = truth[torch.randperm(len(truth), generator=draw)]
    noise = torch.randn(len(truth), 8, generator=draw, dtype=torch.float64)
    z = torch.nn.functional.normalize(centres[truth] + spread * noise, dim=-1)
    return 1 - z @ z.T, truth


@pytest.mark.parametrize("sizes", [(5, 3), (2, 2, 4), (6, 1, 1), (4, 4, 4, 4)])
def test_planted_clusters_are_found_as_scikit_learn_finds_them(sizes):
    from sklearn.cluster import SpectralClustering

    groups = [planted(sizes, seed) for seed in range(5)]
    labels = spectral_clusters(torch.stack([distances for distances, _ in groups]), len(sizes))
    for found, (distances, truth) in zip(labels, groups, strict=True):
        assert torch.equal(together(found), together(truth))
        others = distances[~torch.eye(len(truth), dtype=torch.bool)].numpy()
        if 1 not in sizes:  # scikit-learn drops the diagonal, and with it images that are alone
            affinity = np.exp(-0.5 * (2 * distances.numpy() / others.mean()) ** 2)
            rival = SpectralClustering(len(sizes), affinity="precomputed", random_state=0).fit_predict(
                affinity
            )
            assert torch.equal(together(found), together(torch.from_numpy(rival)))


def test_order_does_not_matter():
    distances, _ = planted((3, 2, 3), 7, spread=0.3)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    plain = spectral_clusters(distances[None], 3)[0]
    permuted = spectral_clusters(distances[order][:, order][None], 3)[0]
    assert torch.equal(together(plain)[order][:, order], together(permuted))


def test_one_cluster_many_clusters_and_images_all_alike():
    distances, _ = planted((3, 3), 0)
    assert spectral_clusters(distances[None], 1).tolist() == [[0] * 6]
    assert cluster_sizes(spectral_clusters(distances[None], 10)).tolist() == [[1] * 6]
    both = torch.stack([torch.zeros(6, 6, dtype=torch.float64), distances])
    assert cluster_sizes(spectral_clusters(both, 2)).tolist() == [[6] * 6, [3] * 6]


def test_cluster_sizes():
    assert cluster_sizes(torch.tensor([[0, 2, 2, 1], [1, 1, 1, 1]])).tolist() == [[1, 2, 2, 1], [4] * 4]


def test_groups_of_none_and_no_groups():
    assert spectral_clusters(torch.zeros(2, 0, 0), 3).shape == (2, 0)
    assert spectral_clusters(torch.zeros(0, 3, 3), 2).shape == (0, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: spectral_clusters(torch.zeros(3, 4), 2),
        lambda: spectral_clusters(torch.zeros(1, 3, 4), 2),
        lambda: spectral_clusters(torch.zeros(1, 4, 4), 0),
        lambda: cluster_sizes(torch.zeros(3)),
    ],
)
def test_refuses_what_does_not_fit(call):
    with pytest.raises(InputError):
        call()
