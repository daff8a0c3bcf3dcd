"""Shortcuts: groups of samples whose predictions rest on one suspicious place, found by clustering saliency maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.saliency.clustering import embedded, positive_shares, spectral_clusters

__all__ = ["OUTSIDE", "Cluster", "find_shortcuts", "places"]

MOSTLY = 0.5  # of the mass beyond what an even map has there
LEVEL = 0.001  # of the test against chance, for all places together
OUTSIDE = "outside the foreground"  # a place, where foregrounds are known
ALIKE = 0.02  # suspicions that do not differ


@dataclass(frozen=True, eq=False)
class Cluster:
    """Samples whose predictions rest on the same part of the picture.

    Attributes:
        members: Row numbers ``(n,)``, the most typical first.
        classes: How many members have each right class, the commonest first.
        error_rate: Share of the members that are predicted wrong.
        mean_map: Mean of the members' maps, each of which sums to 1, ``(H, W)``.
        excess: The mean map less that of all samples, ``(H, W)``.
        mass: Share of the mean map on each of :func:`places`; and outside of its members' foregrounds, if known.
        place: The smallest place with the most mass for its size; of those that it is flagged for, if it is.
        suspicion: Mass on that place, corrected for its size: 0 is what an even map has there, 1 is everything.
        chance: Bound on the probability that as many samples look there as do, if maps lay anywhere.
        flagged: Whether ``suspicion`` is above 0.5 and ``chance`` below 0.001.
    """

    members: Tensor
    classes: Mapping[int, int]
    error_rate: float
    mean_map: Tensor
    excess: Tensor
    mass: Mapping[str, float]
    place: str
    suspicion: float
    chance: float
    flagged: bool

    def __len__(self) -> int:
        return len(self.members)

    @property
    def where(self) -> str:
        """The place in words, for the middle of a sentence."""
        return self.place if self.place == OUTSIDE else f"on the {self.place}"


def places(height: int, width: int, border: float = 1 / 7) -> dict[str, Tensor]:
    """Where no object should be: corners, edges and all of the border, as masks ``(H, W)`` in float64.

    Args:
        height: Of the maps.
        width: Of the maps.
        border: Its width as a share of the picture's; at least one cell.

    Example:
        >>> [name for name, mask in places(7, 7).items() if mask[0, 0]]
        ['top left corner', 'corners', 'top edge', 'left edge', 'border']
    """
    high, wide = max(1, round(border * height)), max(1, round(border * width))
    row, column = torch.arange(height)[:, None], torch.arange(width)[None]
    top, bottom, left, right = row < high, row >= height - high, column < wide, column >= width - wide
    masks = {
        "top left corner": top & left,
        "top right corner": top & right,
        "bottom left corner": bottom & left,
        "bottom right corner": bottom & right,
        "corners": (top | bottom) & (left | right),
        "top edge": top,
        "bottom edge": bottom,
        "left edge": left,
        "right edge": right,
        "border": top | bottom | left | right,
    }
    return {name: mask.expand(height, width).double() for name, mask in masks.items()}


def find_shortcuts(
    maps: Tensor,
    labels: Tensor,
    predictions: Tensor,
    *,
    foreground: Tensor | None = None,
    border: float = 1 / 7,
    size: int = 14,
    neighbours: int = 10,
    largest: int = 12,
    seed: int = 0,
) -> list[Cluster]:
    r"""Cluster saliency maps, and say which clusters look where no object is.

    A cluster's mass on a place is the share of its mean map there, the members' maps being cut at 0 and normalised to
    sum 1 each. Places differ in size, so suspicion is the mass beyond an even map's, :math:`(m - a) / (1 - a)` for mass
    ``m`` on a share ``a`` of the picture. A cluster is flagged if

    - its suspicion for one place is above 0.5, and
    - no chance explains it: as many samples (of all) look mostly there as would with a probability below 0.001 if each
      map were shifted, around the edges, to anywhere. That probability is exact, and multiplied by the number of
      places. What lies outside of ``foreground`` needs no such test: there, somebody has said what matters.

    A shortcut in the middle of the picture is a cluster as well, but no place tells it from an object: give
    ``foreground``, or look at the strips.

    Args:
        maps: Maps ``(N, H, W)`` of the predicted classes, positive where they speak for them.
        labels: Right classes ``(N,)``.
        predictions: Predicted classes ``(N,)``.
        foreground: Masks ``(N, H, W)``, 1 on the object, 0 elsewhere.
        border: As for :func:`places`.
        size: As for :func:`~lightning_robust.saliency.clustering.embedded`.
        neighbours: As for :func:`~lightning_robust.saliency.clustering.spectral_clusters`.
        largest: As for :func:`~lightning_robust.saliency.clustering.spectral_clusters`.
        seed: As for :func:`~lightning_robust.saliency.clustering.spectral_clusters`.

    Returns:
        All clusters, flagged ones first, then the more suspicious ones.

    Raises:
        ValueError: If shapes do not fit, or there is no map.

    Example:
        Of 60 maps, a third have everything in one corner.

        >>> maps = torch.rand(60, 14, 14, generator=torch.Generator().manual_seed(0)) ** 4
        >>> maps[40:], maps[40:, :2, -2:] = 0.0, 1.0
        >>> first, *others = find_shortcuts(maps, torch.arange(60) % 3, torch.arange(60) % 3)
        >>> first.flagged, first.place, len(first), any(cluster.flagged for cluster in others)
        (True, 'top right corner', 20, False)

    References:
        Lapuschkin et al., `Unmasking Clever Hans Predictors and Assessing What Machines Really Learn
        <https://arxiv.org/abs/1902.10178>`_, 2019 (spectral relevance analysis).
    """
    _check(maps, labels, predictions, foreground)
    labels, predictions = labels.cpu(), predictions.cpu()
    shares = positive_shares(maps)
    which = spectral_clusters(embedded(maps, size), neighbours=neighbours, largest=largest, seed=seed)
    masks = {name: mask[None] for name, mask in places(maps.shape[1], maps.shape[2], border).items()}
    if foreground is not None:
        masks[OUTSIDE] = 1 - foreground.detach().cpu().double().clamp(0, 1)
    looks = {name: _Look.of(shares, mask) for name, mask in masks.items()}
    chance = {name: min(1.0, len(looks) * look.chance()) for name, look in looks.items()}
    if foreground is not None:
        chance[OUTSIDE] = 0.0
    clusters = []
    for number in range(int(which.max()) + 1):
        rows = (which == number).nonzero()[:, 0]
        mean = shares[rows].mean(0)
        mass = {name: float(look.mass[rows].mean()) for name, look in looks.items()}
        beyond = {name: _beyond(mass[name], float(look.even[rows].mean())) for name, look in looks.items()}
        shown = [name for name in looks if beyond[name] > MOSTLY and chance[name] < LEVEL]
        most = max(beyond[name] for name in shown or looks)
        # The smallest of those that are as good: all places around a spot hold it.
        place = min(
            (name for name in shown or looks if beyond[name] >= most - ALIKE),
            key=lambda name: float(looks[name].even[0]),
        )
        typical = F.cosine_similarity(shares[rows].flatten(1), mean.flatten()[None]).argsort(
            descending=True, stable=True
        )
        clusters.append(
            Cluster(
                members=rows[typical],
                classes=dict(Counter(labels[rows].tolist()).most_common()),
                error_rate=float((labels[rows] != predictions[rows]).double().mean()),
                mean_map=mean,
                excess=mean - shares.mean(0),
                mass=mass,
                place=place,
                suspicion=beyond[place],
                chance=chance[place],
                flagged=bool(shown),
            )
        )
    return sorted(clusters, key=lambda cluster: (cluster.flagged, cluster.suspicion), reverse=True)


@dataclass(frozen=True, eq=False)
class _Look:
    """How much each sample looks at one place.

    Attributes:
        mass: Share of each map there, ``(N,)``.
        even: Share of an even map there, ``(N,)``.
        mostly: Whether each map is mostly there, ``(N,)``.
        anywhere: The same as a probability, the map being shifted to anywhere, ``(N,)``.
    """

    mass: Tensor
    even: Tensor
    mostly: Tensor
    anywhere: Tensor

    @classmethod
    def of(cls, shares: Tensor, mask: Tensor) -> _Look:
        sides = shares.shape[1:]
        even = mask.mean((1, 2)).expand(len(shares))
        # The mass at all shifts at once; the first is none at all.
        shifted = torch.fft.irfft2(torch.fft.rfft2(shares) * torch.fft.rfft2(mask).conj(), s=sides).flatten(1)
        mostly = shifted > (even + MOSTLY * (1 - even) + 1e-9)[:, None]
        return cls((shares * mask).sum((1, 2)), even, mostly[:, 0], mostly.double().mean(1))

    def chance(self) -> float:
        """Probability that at least as many samples are mostly here as are."""
        counts = torch.zeros(len(self.mass) + 1, dtype=torch.float64)
        counts[0] = 1
        for p in self.anywhere[self.anywhere > 0].tolist():
            counts = counts * (1 - p) + counts.roll(1) * p  # of independent samples with probabilities of their own
        return float(counts[int(self.mostly.sum()) :].sum())


def _beyond(mass: float, even: float) -> float:
    return (mass - even) / (1 - even) if even < 1 else 0.0


def _check(maps: Tensor, labels: Tensor, predictions: Tensor, foreground: Tensor | None) -> None:
    if maps.ndim != 3 or not len(maps) or labels.shape != maps.shape[:1] or predictions.shape != maps.shape[:1]:
        raise ValueError(
            f"expected maps (N, H, W) of at least one sample with a label and a prediction each, got "
            f"{tuple(maps.shape)}, {tuple(labels.shape)} and {tuple(predictions.shape)}."
        )
    if foreground is not None and foreground.shape != maps.shape:
        raise ValueError(
            f"expected foreground= masks {tuple(maps.shape)} like the maps, 1 on the object, got "
            f"{tuple(foreground.shape)}."
        )
