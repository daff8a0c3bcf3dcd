"""Cells: a corruption at a severity, or a loader of other data; which are measured, and what they make of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_robust.callbacks.shifted import MEASURES
from lightning_robust.corruptions import CORRUPTIONS, SEVERITIES, applicable, corrupt
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import priorities

__all__ = [
    "CLEAN",
    "SMALLEST",
    "Cell",
    "cells_of",
    "check_loaders",
    "check_metrics",
    "corrupted",
    "first_cells",
    "is_picture",
]

SMALLEST = 4  # pixels a side
BYTES = PixelSpace(bounds=(0, 255))
FIRST_SEVERITIES = (3, 5, 1, 4, 2)  # in which order cells are chosen where not all are measured


@dataclass(frozen=True)
class Cell:
    """A corruption at a severity, or a loader of other data.

    Attributes:
        name: Of the corruption or of the loader.
        severity: 1 to 5; 0 for a loader.
    """

    name: str
    severity: int = 0

    @property
    def key(self) -> str:
        """As log keys have it."""
        return f"{self.name}_{self.severity}" if self.severity else self.name


CLEAN = Cell("clean")


def cells_of(corruptions: Sequence[str] | None, severities: Sequence[int]) -> list[Cell]:
    """Every corruption at every severity; None for all corruptions.

    Raises:
        ValueError: If a corruption is unknown, or a severity none of 1 to 5.

    Example:
        >>> [cell.key for cell in cells_of(["fog", "contrast"], [1, 5])]
        ['fog_1', 'fog_5', 'contrast_1', 'contrast_5']
    """
    for what, given in (("corruptions", corruptions), ("severities", severities)):
        if isinstance(given, (str, int)):
            raise ValueError(f"{what}= takes a list, got {given!r}; write {what}=[{given!r}].")
    names = list(CORRUPTIONS) if corruptions is None else list(dict.fromkeys(corruptions))
    for corruption in names:
        applicable(corruption, 3)  # whether there is such a one
    if not set(severities) <= set(SEVERITIES) or (names and not severities):
        raise ValueError(f"severities= takes some of 1, 2, 3, 4, 5, got {list(severities)}.")
    levels = list(dict.fromkeys(int(severity) for severity in severities))
    return [Cell(corruption, severity) for corruption in names for severity in levels]


def first_cells(cells: Sequence[Cell], limit: int | None, every: Sequence[Cell], seed: int) -> list[Cell]:
    """The cells that are measured where not all are.

    Args:
        cells: To choose from.
        limit: How many; None for all.
        every: All cells, of whose corruptions the order is drawn.
        seed: Of that order.

    Example:
        >>> fog = cells_of(["fog"], [1, 3, 5])
        >>> [cell.key for cell in first_cells(fog, 2, fog, seed=0)]
        ['fog_3', 'fog_5']
    """
    names = list(dict.fromkeys(cell.name for cell in every))
    order = dict(zip(names, priorities(torch.arange(len(names)), seed).tolist(), strict=True))
    ranked = sorted(cells, key=lambda cell: (FIRST_SEVERITIES.index(cell.severity), order[cell.name]))
    return ranked if limit is None else ranked[:limit]


def is_picture(x: Tensor, smallest: int) -> bool:
    """Whether an input can be corrupted: pictures ``(N, C, H, W)``, floating point or bytes."""
    return x.ndim == 4 and min(x.shape[2:]) >= smallest and (x.is_floating_point() or x.dtype == torch.uint8)


def corrupted(cell: Cell, x: Tensor, index: Tensor, *, seed: int, table: str | None, pixels: PixelSpace) -> Tensor:
    """Pictures under the corruption of a cell, in the dtype of ``x``.

    Args:
        cell: Not that of a loader.
        x: Pictures ``(N, C, H, W)``, in ``pixels``, or bytes.
        index: Number of each sample, ``(N,)``.
        seed: Of what corruptions draw.
        table: Of settings; None for by size.
        pixels: The pixel space of floating-point inputs.
    """
    settings: dict[str, Any] = {"index": index, "seed": seed, "table": table}
    if x.dtype == torch.uint8:  # a step that tells bytes from numbers gets bytes
        made = corrupt(x.float(), cell.name, cell.severity, pixels=BYTES, **settings)
        return made.round().clamp(0, 255).to(torch.uint8)
    return corrupt(x, cell.name, cell.severity, pixels=pixels, **settings)


def check_loaders(loaders: Any) -> None:
    """Whether loaders of other data have names that are theirs alone, and can be iterated again.

    Raises:
        TypeError: If they have no names, or one holds no samples.
        ValueError: If not.
    """
    if loaders is None:
        return
    if not isinstance(loaders, Mapping):
        raise TypeError(
            "shift_loaders= takes names and labelled data sets or loaders, {'other': loader}; got a "
            f"{type(loaders).__name__}."
        )
    cells = {Cell(name, severity).key for name in CORRUPTIONS for severity in (0, *SEVERITIES)}
    for name, source in loaders.items():
        if not hasattr(source, "__iter__") and not hasattr(source, "__getitem__"):
            raise TypeError(
                f"shift_loaders[{name!r}] takes a labelled data set, a list of batches or a DataLoader; got a "
                f"{type(source).__name__}."
            )
        if name in {*cells, CLEAN.key, "group"}:
            raise ValueError(
                f"shift_loaders= may not be called like something else in its keys, got {name!r}; rename it."
            )
        if hasattr(source, "__next__"):
            raise ValueError(
                f"shift_loaders[{name!r}] is an iterator, which can be iterated once only; give a data set, a list or "
                "a DataLoader, which every evaluation can go through."
            )


def check_metrics(metrics: Any) -> None:
    """Whether metrics of the user's own have names that are theirs alone.

    Raises:
        TypeError: If they have no names.
        ValueError: If not.
    """
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"metrics= takes names and torchmetrics objects, {{'f1': metric}}; got a {type(metrics).__name__}."
        )
    taken = [name for name in metrics if name in MEASURES or name.endswith("_auroc")]
    if taken:
        raise ValueError(f"metrics= may not be called like what is measured anyway, got {taken}; rename them.")
