"""The evaluation loaders of a trainer: how many, what they are called, how long they really are."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DistributedSampler

__all__ = ["evaluation_loaders", "named", "true_length"]


def evaluation_loaders(trainer: Any) -> list[tuple[str, Any]]:
    """What the running evaluation iterates, as names and loaders in order."""
    return named(trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders)


def named(loaders: Any, name: str = "") -> list[tuple[str, Any]]:
    """One loader, or nested lists and dicts of them, flat; with the user's names where there are any, else indices.

    Example:
        >>> named({"near": "a loader", "far": ["another", "a third"]})
        [('near', 'a loader'), ('far/0', 'another'), ('far/1', 'a third')]
    """
    if isinstance(loaders, (list, tuple, dict)):
        items = loaders.items() if isinstance(loaders, dict) else enumerate(loaders)
        return [pair for key, child in items for pair in named(child, f"{name}/{key}".lstrip("/"))]
    return [(name or "0", loaders)]


def true_length(loader: Any, world: int) -> int:
    """How many samples there really are: a distributed sampler repeats some to deal evenly."""
    sampler = getattr(loader, "sampler", None)
    if world > 1 and isinstance(sampler, DistributedSampler):
        return len(sampler.dataset)  # type: ignore[arg-type]  # the sampler itself asks for its length
    return 2**62
