"""Saliency maps as points, and clusters of them by spectral clustering."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.randomness import seeded

__all__ = ["embedded", "positive_shares", "spectral_clusters"]

RESTARTS, PASSES = 10, 100  # of k-means


def positive_shares(maps: Tensor) -> Tensor:
    """Maps cut at 0 and divided by their sum: which share of what speaks for the target is where.

    Args:
        maps: Maps ``(N, H, W)``; negative values and NaN count as nothing.

    Returns:
        Maps of sum 1, or 0 throughout, in float64 on the CPU.

    Example:
        >>> positive_shares(torch.tensor([[[3.0, 1.0, -9.0]], [[0.0, -1.0, 0.0]]]))[:, 0]
        tensor([[0.7500, 0.2500, 0.0000],
                [0.0000, 0.0000, 0.0000]], dtype=torch.float64)
    """
    positive = maps.detach().cpu().double().nan_to_num(0, 0, 0).clamp(min=0)
    total = positive.sum((1, 2), keepdim=True)
    return positive / total.where(total > 0, 1.0)


def embedded(maps: Tensor, size: int = 14) -> Tensor:
    """Maps as points to be clustered: what speaks for the target, at most ``size`` cells a side, each map of sum 1.

    Args:
        maps: Maps ``(N, H, W)``; negative values (what speaks against the target) and NaN count as nothing.
        size: Larger maps are averaged down to it.

    Returns:
        Points ``(N, D)`` in float64 on the CPU; a map without anything positive is the zero point.

    Example:
        >>> embedded(torch.tensor([[[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, -9.0, 0.0]]]), size=2)
        tensor([[0.5000, 0.0000, 0.5000, 0.0000]], dtype=torch.float64)
    """
    height, width = (min(size, side) for side in maps.shape[1:])
    return positive_shares(F.adaptive_avg_pool2d(positive_shares(maps), (height, width))).flatten(1)


def spectral_clusters(points: Tensor, *, neighbours: int = 10, largest: int = 12, seed: int = 0) -> Tensor:
    """Spectral clustering on the graph of nearest neighbours; the number of clusters is where the eigenvalues jump.

    Args:
        points: Points ``(N, D)``.
        neighbours: Points that each one is joined to.
        largest: Number of clusters at most; at least two are made of three points or more.
        seed: Of k-means among the eigenvectors.

    Returns:
        The cluster of each point, ``(N,)``, numbered from 0 in the order in which they appear.

    Example:
        >>> spectral_clusters(torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]]), neighbours=2)
        tensor([0, 0, 0, 1, 1, 1])

    References:
        von Luxburg, `A Tutorial on Spectral Clustering <https://arxiv.org/abs/0711.0189>`_, 2007, sections 4 and 8.3
        (normalised as by Ng, Jordan and Weiss, 2001).
    """
    n = len(points)
    if n < 3:
        return torch.zeros(n, dtype=torch.long)
    points = points.detach().cpu().double()
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    nearest = distances.topk(min(neighbours, n - 1), largest=False).indices
    joined = torch.zeros_like(distances).scatter_(1, nearest, 1.0)
    joined = (joined + joined.T) / 2
    scale = joined.sum(1).rsqrt()
    values, vectors = torch.linalg.eigh(torch.eye(n, dtype=torch.float64) - scale[:, None] * joined * scale)
    jumps = values[: min(largest, n - 1) + 1].diff()[1:]  # behind the second eigenvalue, the third, ...
    number = int(jumps.argmax()) + 2
    labels = _k_means(F.normalize(vectors[:, :number], dim=1), number, seed).tolist()
    order = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return torch.tensor([order[label] for label in labels])


def _k_means(points: Tensor, k: int, seed: int) -> Tensor:
    """The best of several runs of Lloyd's algorithm from k-means++ starts."""
    generator = seeded(seed, k)
    best, least = torch.zeros(len(points), dtype=torch.long), math.inf
    for _ in range(RESTARTS):
        centres = points[torch.randint(len(points), (1,), generator=generator)]
        while len(centres) < k:
            far = torch.cdist(points, centres).amin(1).square()
            # Where there are fewer different points than centres, any of them will do.
            pick = torch.multinomial(far + 1e-30, 1, generator=generator)
            centres = torch.cat([centres, points[pick]])
        labels = torch.full((len(points),), -1)
        for _ in range(PASSES):
            nearest = torch.cdist(points, centres).argmin(1)
            if torch.equal(nearest, labels):
                break
            labels = nearest
            for i in range(k):
                if bool((labels == i).any()):
                    centres[i] = points[labels == i].mean(0)
        inertia = float((points - centres[labels]).square().sum())
        if inertia < least:
            best, least = labels, inertia
    return best
