"""Samples that wait to be explained, and then, small, one row each of a table that all processes fill together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Kept", "Table", "rows_of", "small"]

LARGEST_SIDE = 56  # of the maps and pictures that are kept
ABOUT = 3  # columns in front: number, label, prediction


@dataclass(frozen=True, eq=False)
class Kept:
    """Some samples of a batch, as many as are explained at once, on the CPU.

    Attributes:
        index: Their numbers in the data, ``(M,)``.
        x: The inputs, ``(M, C, H, W)``.
        label: Right classes ``(M,)``.
        prediction: Predicted classes ``(M,)``.
        foreground: Masks ``(M, h, w)``, already :func:`small`, if there are any.
    """

    index: Tensor
    x: Tensor
    label: Tensor
    prediction: Tensor
    foreground: Tensor | None


@dataclass(frozen=True, eq=False)
class Table:
    """Explained samples of all processes, in the order of the data.

    Attributes:
        labels: Right classes ``(N,)``.
        predictions: Predicted classes ``(N,)``.
        maps: What was explained, ``(N, h, w)``, in float64.
        images: Pixels ``(N, C, h, w)``.
        foreground: Masks ``(N, h, w)``, if there are any.
    """

    labels: Tensor
    predictions: Tensor
    maps: Tensor
    images: Tensor
    foreground: Tensor | None

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def gathered(
        cls,
        rows: Sequence[Tensor],
        largest: int,
        shape: torch.Size,
        foreground: bool,
        summed: Callable[[Tensor], Tensor],
    ) -> Table:
        """What all processes have, each giving :func:`rows_of` its own samples.

        Args:
            rows: Of this process.
            largest: All sample numbers are below it.
            shape: Of one input, ``(C, H, W)``.
            foreground: Whether rows have masks.
            summed: Sums a tensor over all processes.
        """
        channels, height, width = _small_shape(shape)
        parts = 1 + channels + foreground
        # Every sample has its place, and is in one process: a sum of places loses nothing, whoever has what.
        places = torch.zeros(largest, 1 + ABOUT + parts * height * width, dtype=torch.float64)
        if rows:
            own = torch.cat(list(rows))
            places[own[:, 0].long(), 0], places[own[:, 0].long(), 1:] = 1.0, own
        places = summed(places)
        table = places[places[:, 0] == 1, 1:]
        planes = table[:, ABOUT:].view(len(table), parts, height, width)
        return cls(
            labels=table[:, 1].long(),
            predictions=table[:, 2].long(),
            maps=planes[:, 0],
            images=planes[:, 1 : 1 + channels].float(),
            foreground=planes[:, -1] if foreground else None,
        )


def rows_of(kept: Kept, maps: Tensor, pixels: Tensor) -> Tensor:
    """One row a sample: number, label, prediction, and then map, picture and foreground, made small.

    Args:
        kept: The samples.
        maps: What explains them, ``(M, H, W)``; what speaks against the target counts as nothing.
        pixels: Their pictures ``(M, C, H, W)``; three channels are kept as they are, of others the mean.

    Returns:
        Rows ``(M, D)`` in float64 on the CPU.
    """
    pictures = small(pixels)
    pictures = pictures if pictures.shape[1] == 3 else pictures.mean(1, keepdim=True)
    parts = [small(maps.cpu().clamp(min=0)[:, None]), pictures]
    if kept.foreground is not None:
        parts.append(kept.foreground)
    about = torch.stack([kept.index, kept.label, kept.prediction], 1)
    return torch.cat([about.double(), *(part.double().flatten(1) for part in parts)], 1)


def small(planes: Tensor) -> Tensor:
    """Pictures ``(N, C, H, W)`` averaged down, so that hundreds of them are no burden.

    Example:
        >>> small(torch.zeros(2, 3, 28, 28)).shape, small(torch.zeros(2, 3, 224, 160)).shape
        (torch.Size([2, 3, 28, 28]), torch.Size([2, 3, 56, 40]))
    """
    _, height, width = _small_shape(planes.shape[1:])
    return F.adaptive_avg_pool2d(planes.float(), (height, width))


def _small_shape(shape: torch.Size) -> tuple[int, int, int]:
    """Channels that are shown, height and width of what is kept of inputs of this shape."""
    times = math.ceil(max(shape[1:]) / LARGEST_SIDE)
    return 3 if shape[0] == 3 else 1, math.ceil(shape[1] / times), math.ceil(shape[2] / times)
