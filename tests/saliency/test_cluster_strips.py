"""The picture of the clusters: a row each, what is flagged in red."""

from __future__ import annotations

import pytest
import torch
from saliency.planted_maps import SIDE, planted

from lightning_robust.pictures import BAD
from lightning_robust.saliency.cluster_strips import cluster_strips
from lightning_robust.saliency.shortcuts import find_shortcuts


def test_strips_have_a_row_a_cluster_and_flagged_ones_in_red() -> None:
    maps, _ = planted(0)
    classes = torch.arange(120) % 3
    clusters = find_shortcuts(maps, classes, classes)
    images = torch.rand(120, 3, SIDE, SIDE)
    pictures = [
        cluster_strips([cluster], maps, images, classes, classes, (0.0, 1.0), names=["cat", "dog", "hen"])
        for cluster in clusters
    ]
    whole = cluster_strips(clusters, maps, images, classes, classes, (0.0, 1.0))
    assert whole.shape == (3, sum(p.shape[1] for p in pictures), 8 * SIDE * 8 + 7 * 6)
    assert 0 <= float(whole.min()) <= float(whole.max()) <= 1
    red = torch.tensor(BAD)[:, None, None] / 255
    reds = [bool(((picture[:, :20] - red).abs() < 0.02).all(0).any()) for picture in pictures]
    assert reds == [cluster.flagged for cluster in clusters]


def test_images_of_another_size_are_refused() -> None:
    maps, zeros = torch.rand(4, 7, 7), torch.zeros(4)
    with pytest.raises(ValueError, match="as large as the maps"):
        cluster_strips(find_shortcuts(maps, zeros, zeros), maps, torch.rand(4, 1, 8, 8), zeros, zeros, (0.0, 1.0))


def test_there_are_no_strips_of_no_clusters() -> None:
    zeros = torch.zeros(4)
    with pytest.raises(ValueError, match="got 0 clusters"):
        cluster_strips([], torch.rand(4, 7, 7), torch.rand(4, 1, 7, 7), zeros, zeros, (0.0, 1.0))
