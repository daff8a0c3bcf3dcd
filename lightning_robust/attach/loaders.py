"""The evaluation loaders of a trainer: how many, what they are called, how long they really are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import mode
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_robust.attach.batches import described, leaves
from lightning_robust.attach.sharded import NOBODY, is_sharded
from lightning_robust.attach.step import defines
from lightning_robust.randomness import untouched_random_state

__all__ = [
    "evaluation_loaders",
    "is_everyones",
    "named",
    "own_batches",
    "shuffles",
    "size_of",
    "transferred",
    "true_length",
]


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


def own_batches(trainer: Any, loader: Any, limit: float = math.inf) -> Iterator[tuple[Any, Tensor]]:
    """Batches of a loader that this process takes, with the numbers of their samples among all.

    Where a distributed sampler has dealt the samples, all batches are this process's; else every world-th one. The
    global random streams stay as they are, although iterating a loader draws from them. Where the module is sharded,
    all processes get equally many: who has none left gets one again, whose samples have the number of nobody.

    Args:
        trainer: Knows how many processes there are, and which this one is.
        loader: Any iterable of batches.
        limit: Stop after so many samples (over all processes).

    Yields:
        The batch as the loader gives it, and the number of each sample, ``(N,)``.
    """
    world, rank = trainer.world_size, trainer.global_rank
    dealt = world > 1 and isinstance(getattr(loader, "sampler", None), DistributedSampler)
    together = world > 1 and not dealt and is_sharded(trainer.lightning_module)
    seen = taken = i = 0
    batch = None
    with untouched_random_state():
        for i, batch in enumerate(loader):
            n = size_of(batch)
            index = seen + torch.arange(n)
            seen += n
            if dealt:
                yield batch, index * world + rank
            elif i % world == rank:
                taken += 1
                yield batch, index
            if seen * (world if dealt else 1) >= limit:
                break
        if together and seen and taken <= i // world:
            yield batch, torch.full((size_of(batch),), NOBODY)


def transferred(trainer: Any, module: Any, batch: Any) -> Any:
    """A batch of a loader of ours as Lightning would hand it to a step: precision, hooks and device."""
    batch = trainer.precision_plugin.convert_input(batch)
    for owner in (trainer.datamodule, module):
        if owner is not None and defines(owner, "on_before_batch_transfer"):
            batch = owner.on_before_batch_transfer(batch, 0)
            break
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def size_of(batch: Any) -> int:
    """How many samples a batch holds: the number of rows that most of its tensors have.

    Raises:
        ValueError: If it holds no tensor with rows.

    Example:
        >>> size_of({"scale": torch.ones(1), "image": torch.ones(16, 3), "label": torch.ones(16)})
        16
    """
    rows = [len(leaf) for _path, leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    if not rows:
        raise ValueError(f"expected a batch with a tensor of samples in it, got {described(batch)}.")
    return mode(rows)  # of several, the first


def is_everyones(loader: Any) -> bool:
    """Whether each process gets all samples in one and the same order (``use_distributed_sampler=False``).

    Known of torch's own samplers alone: a sampler of somebody else's may well deal.
    """
    sampler, batches = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    return type(sampler) in (SequentialSampler, RandomSampler) and type(batches) in (BatchSampler, type(None))


def shuffles(loader: Any) -> bool:
    """Whether a loader draws its samples in another order each time, as far as torch's own samplers tell.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> [shuffles(DataLoader(range(4), shuffle=shuffle)) for shuffle in (True, False)]
        [True, False]
    """
    drawing = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
    return isinstance(getattr(loader, "sampler", None), drawing)


def true_length(loader: Any, world: int) -> int:
    """How many samples there really are: a distributed sampler repeats some to deal evenly."""
    sampler = getattr(loader, "sampler", None)
    if world > 1 and isinstance(sampler, DistributedSampler):
        return len(sampler.dataset)  # type: ignore[arg-type]  # the sampler itself asks for its length
    return NOBODY
