"""Inputs of other data sets and loaders, as the user's own step would get them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from lightning_robust.attach.batches import Path, described, get, leaves
from lightning_robust.attach.loaders import size_of, transferred
from lightning_robust.attach.step import Step
from lightning_robust.randomness import seeded

__all__ = ["foreign_input", "foreign_loader", "make_of", "same_make", "through_hooks"]


def foreign_loader(source: Any, batch_size: int, limit: int, seed: int) -> Iterable[Any]:
    """Batches of a data set (a seeded choice of ``limit`` samples: data sets are often sorted by class) or loader."""
    if isinstance(source, IterableDataset):
        return DataLoader(source, batch_size)
    if not isinstance(source, Dataset):
        return source  # type: ignore[no-any-return]  # a loader, or any iterable of batches
    length = len(source)  # type: ignore[arg-type]  # a map-style data set
    order = torch.randperm(length, generator=seeded(seed)).tolist()
    return DataLoader(Subset(source, sorted(order[:limit])), batch_size)


def through_hooks(trainer: Any, step: Step, batch: Any, like: Tensor, place: Path) -> Any:
    """A batch made as the evaluation loader makes them, as the step gets it; None if it is of another make.

    Args:
        trainer: Its hooks and device.
        step: The evaluation step, with a batch of its own.
        batch: What the other loader gave.
        like: The input of the step's own batch.
        place: Where that input is.
    """
    # Hooks may turn what a loader makes into something else: either side of them tells.
    alike = same_make(batch, step.batch)
    try:
        moved = transferred(trainer, step.module, batch)
    except Exception:  # a hook may fail in any way on what it was not written for
        if alike:
            raise
        return None
    if not same_make(moved, step.batch):
        return None
    found = get(moved, place)
    return moved if alike or (len(found) == size_of(batch) and found.shape[1:] == like.shape[1:]) else None


def foreign_input(batch: Any, found: Any, like: Tensor, what: str) -> Tensor:
    """The input in a batch: what was found, or the one tensor that looks like ``like``; on its device, in its type.

    Raises:
        ValueError: If there is none, or several.
    """
    if found is None:
        fits = [
            leaf
            for _, leaf in leaves(batch)
            if isinstance(leaf, Tensor)
            and leaf.is_floating_point() == like.is_floating_point()
            and leaf.shape[1:] == like.shape[1:]
        ]
        found = fits[0] if len(fits) == 1 else None
    if not isinstance(found, Tensor) or found.shape[1:] != like.shape[1:]:
        raise ValueError(
            f"{what}: expected inputs like those of the evaluation data, (N, "
            f"{', '.join(map(str, like.shape[1:]))}), got a batch with {described(batch)}."
        )
    return found.to(like.device, like.dtype)


def same_make(batch: Any, other: Any) -> bool:
    """Whether two batches have their tensors at the same places."""
    return make_of(batch) == make_of(other)


def make_of(batch: Any) -> set[Path]:
    """Where a batch has tensors; names and ids come one a sample and say nothing about its make."""
    return {path for path, leaf in leaves(batch) if isinstance(leaf, Tensor)}
