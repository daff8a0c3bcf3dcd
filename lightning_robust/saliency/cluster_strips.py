"""Clusters of saliency maps as one picture: where each looks, and its most typical members."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.pictures import (
    BAD,
    GOOD,
    INK,
    captioned,
    diverging,
    enlarged,
    sequential,
    table_of,
    to_rgb,
    wrapped,
)
from lightning_robust.saliency.clustering import positive_shares
from lightning_robust.saliency.overlays import overlaid
from lightning_robust.saliency.shortcuts import OUTSIDE, Cluster

__all__ = ["cluster_strips"]

_GAP = 6


def cluster_strips(
    clusters: Sequence[Cluster],
    maps: Tensor,
    images: Tensor,
    labels: Tensor,
    predictions: Tensor,
    bounds: tuple[float, float],
    *,
    names: Sequence[str] | None = None,
    members: int = 6,
) -> Tensor:
    """One row a cluster: its mean map, what it has beyond all samples, and its most typical members under their maps.

    Args:
        clusters: What :func:`~lightning_robust.saliency.shortcuts.find_shortcuts` found; flagged ones in red.
        maps: The maps that it was given, ``(N, H, W)``.
        images: Pixels ``(N, C, H, W)``.
        labels: Right classes ``(N,)``.
        predictions: Predicted classes ``(N,)``.
        bounds: The pixel range.
        names: Names of the classes; without them classes are numbers.
        members: How many are shown.

    Returns:
        The picture ``(3, H', W')`` in [0, 1].

    Raises:
        ValueError: If there is no cluster, or images and maps differ in size.

    Example:
        >>> maps, zeros = torch.rand(9, 14, 14), torch.zeros(9, dtype=torch.long)
        >>> from lightning_robust.saliency.shortcuts import find_shortcuts
        >>> clusters = find_shortcuts(maps, zeros, zeros)
        >>> cluster_strips(clusters, maps, torch.rand(9, 1, 14, 14), zeros, zeros, (0.0, 1.0)).shape
        torch.Size([3, ..., ...])
    """
    if not clusters or images.ndim != 4 or (len(images), *images.shape[2:]) != tuple(maps.shape):
        raise ValueError(
            f"strips need clusters, and images (N, C, H, W) as large as the maps; got {len(clusters)} clusters, images "
            f"{tuple(images.shape)} and maps {tuple(maps.shape)}."
        )
    shares = positive_shares(maps)
    # One scale for all means, one for all members: the tenth of a percent that is brightest is cut off.
    top = torch.stack([cluster.mean_map for cluster in clusters]).flatten().quantile(0.999).clamp(min=1e-12)
    strips = []
    for number, cluster in enumerate(clusters, 1):
        shown = cluster.members[:members]
        amounts = shares[shown]
        amounts = amounts / amounts.flatten(1).amax(1)[:, None, None].clamp(min=1e-12)
        pictures = overlaid(to_rgb(images[shown], *bounds), amounts)
        seen = zip(labels[shown].tolist(), predictions[shown].tolist(), strict=True)
        tiles = [
            captioned(enlarged(sequential(cluster.mean_map / top)[None])[0], "mean map"),
            captioned(enlarged(diverging(cluster.excess / top)[None])[0], "beyond all"),
            *(
                captioned(tile, f"{_name(label, names)}, seen {_name(guess, names)}", GOOD if label == guess else BAD)
                for tile, (label, guess) in zip(pictures, seen, strict=True)
            ),
        ]
        row = table_of([tiles + [torch.ones_like(tiles[0])] * (members - len(shown))], _GAP)
        text = wrapped(f"{number}. {_caption(cluster, names)}", row.shape[-1])
        strips.append(F.pad(captioned(row, text, BAD if cluster.flagged else INK), (0, 0, 0, _GAP), value=1.0))
    return torch.cat(strips, dim=1)


def _caption(cluster: Cluster, names: Sequence[str] | None) -> str:
    classes = ", ".join(f"{_name(kind, names)} ({count})" for kind, count in list(cluster.classes.items())[:5])
    shown = {"on the border": cluster.mass["border"]}
    if OUTSIDE in cluster.mass:
        shown[OUTSIDE] = cluster.mass[OUTSIDE]
    if cluster.suspicion > 0:  # no place worth a name otherwise
        shown = {cluster.where: cluster.mass[cluster.place], **shown}
    masses = ", ".join(f"{100 * mass:.0f} % {where}" for where, mass in shown.items())
    return (
        f"{'Looks like a shortcut. ' if cluster.flagged else ''}{len(cluster)} samples, "
        f"{100 * cluster.error_rate:.1f} % wrong; of the mass {masses}; classes {classes}"
        f"{', ...' if len(cluster.classes) > 5 else ''}"
    )


def _name(kind: int, names: Sequence[str] | None) -> str:
    return names[kind] if names is not None and 0 <= kind < len(names) else str(kind)
