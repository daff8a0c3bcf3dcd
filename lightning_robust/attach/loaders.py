"""The evaluation loaders of a trainer: how many, what they are called, how long they really are."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DistributedSampler

__all__ = ["count", "evaluation_loaders", "name_of", "nth", "true_length"]


def evaluation_loaders(trainer: Any) -> Any:
    """What the running evaluation iterates: one loader, a list or a dict of them."""
    return trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders


def nth(loaders: Any, index: int) -> Any:
    """Loader number ``index``."""
    if isinstance(loaders, dict):
        return list(loaders.values())[index]
    return loaders[index] if isinstance(loaders, (list, tuple)) else loaders


def count(loaders: Any) -> int:
    """How many there are."""
    return len(loaders) if isinstance(loaders, (dict, list, tuple)) else 1


def name_of(loaders: Any, index: int) -> str:
    """The name that the user gave a loader, else its index."""
    return str(list(loaders)[index]) if isinstance(loaders, dict) else str(index)


def true_length(trainer: Any, loader: int, world: int) -> int:
    """How many samples there really are: a distributed sampler repeats some to deal evenly."""
    one = nth(evaluation_loaders(trainer), loader)
    if world > 1 and isinstance(getattr(one, "sampler", None), DistributedSampler):
        return len(one.sampler.dataset)
    return 2**62
