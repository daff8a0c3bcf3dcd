"""Clusters of points are those that were made, and those of scikit-learn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_robust.randomness import RandomState, seeded
from lightning_robust.saliency.clustering import embedded, spectral_clusters


def blobs(centres: Tensor, each: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points around centres, mixed, and which centre each has."""
    which = torch.arange(len(centres)).repeat(each)[torch.randperm(each * len(centres), generator=seeded(seed))]
    noise = torch.randn(len(which), centres.shape[1], generator=seeded(seed, 1))
    return centres[which] + 0.3 * noise, which


def test_points_are_shares_of_what_speaks_for_the_target() -> None:
    maps = torch.randn(5, 28, 28, generator=seeded(0))
    points = embedded(maps, 7)
    assert points.shape == (5, 49)
    cells = maps.clamp(min=0).double().view(5, 7, 4, 7, 4).sum((2, 4)).flatten(1)
    torch.testing.assert_close(points, cells / cells.sum(1, keepdim=True))


def test_maps_with_nothing_in_them_are_the_zero_point() -> None:
    maps = torch.stack([torch.zeros(4, 4), torch.full((4, 4), -1.0), torch.full((4, 4), torch.nan)])
    assert torch.equal(embedded(maps), torch.zeros(3, 16, dtype=torch.float64))


@pytest.mark.parametrize("number", [2, 3, 5, 8])
def test_the_eigenvalues_tell_how_many_clusters_there_are(number: int) -> None:
    points, which = blobs(10 * torch.eye(number))
    assert alike(spectral_clusters(points), which)


def alike(a: Tensor, b: Tensor) -> bool:
    """The same groups, whatever their numbers."""
    return torch.equal(a[:, None] == a, b[:, None] == b)


@pytest.mark.filterwarnings("ignore:Graph is not fully connected")
@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_those_of_scikit_learn(seed: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    angle = 2 * torch.pi * torch.rand(200, generator=seeded(seed))
    which = torch.arange(200) % 2  # two rings, one inside the other: k-means alone cannot tell them apart
    points = torch.stack([angle.cos(), angle.sin()], 1) * (1 + 2 * which[:, None])
    points = points + 0.05 * torch.randn(points.shape, generator=seeded(seed, 1))
    theirs = cluster.SpectralClustering(2, affinity="nearest_neighbors", n_neighbors=11, random_state=0)
    expected = torch.from_numpy(theirs.fit_predict(points.numpy()))  # they count a point among its own neighbours
    ours = spectral_clusters(points, neighbours=10, largest=2)
    assert alike(ours, expected.long())
    assert alike(ours, which)


def test_clusters_are_a_function_of_points_and_seed_alone() -> None:
    points = torch.rand(80, 5, generator=seeded(0))
    before = RandomState.capture()
    first = spectral_clusters(points)
    torch.rand(3)
    assert torch.equal(first, spectral_clusters(points))
    before.restore()
    spectral_clusters(points, seed=1)
    assert before.is_current()


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_few_points_and_equal_points_are_no_problem(n: int) -> None:
    assert len(spectral_clusters(torch.rand(n, 2))) == n
    assert len(spectral_clusters(torch.ones(10 * n, 2))) == 10 * n
