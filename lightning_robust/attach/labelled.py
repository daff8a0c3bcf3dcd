"""Batches of other labelled data, read through the user's own evaluation step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_robust.attach.batches import Path, described, leaves, shown
from lightning_robust.attach.foreign import foreign_loader
from lightning_robust.attach.loaders import own_batches, transferred, true_length
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.reading import Reading
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.randomness import seeded

__all__ = ["check_make", "kinds_of", "read_labelled", "training_data"]


def read_labelled(
    trainer: Any, probe: Probe, step: Step, source: Any, limit: int, what: str, seed: int = 0, batch_size: int = 256
) -> Iterator[tuple[Reading, Tensor, Tensor]]:
    """Read labelled batches in the place of the one that the evaluation loader gave.

    Args:
        trainer: Its hooks, its device and its processes.
        probe: How steps are read.
        step: The evaluation step with a batch of its own.
        source: A data set (a seeded choice of ``limit`` samples) or any iterable of batches.
        limit: Stop after so many samples.
        what: How errors call the source.
        seed: Of the choice.
        batch_size: For a data set.

    Yields:
        The reading, the number of each sample ``(N,)``, and whether it counts ``(N,)``.

    Raises:
        ProbeError: If a batch is of another make than those of the evaluation loader, or its targets are mixed.
    """
    loader = foreign_loader(source, batch_size, limit, seed)
    length = true_length(loader, trainer.world_size)
    for batch, index in own_batches(trainer, loader, limit):
        moved = transferred(trainer, step.module, batch)
        check_make(what, moved, kinds_of(step.batch), described(step.batch))
        with probe.reading(step.with_batch(moved), listening=True) as reading, torch.no_grad():
            yield reading, index, (index < length) & (index < limit)


Kinds = dict[Path, tuple[bool, int]]
"""Where a batch has tensors, whether these are of floating point, and how many dimensions they have."""


def kinds_of(batch: Any) -> Kinds:
    """How a batch is made."""
    return {path: (leaf.is_floating_point(), leaf.ndim) for path, leaf in leaves(batch) if isinstance(leaf, Tensor)}


def check_make(what: str, batch: Any, wanted: Kinds, words: str) -> None:
    """Whether a batch can take the place of one from the evaluation loader.

    Args:
        what: How errors call it.
        batch: As the step would get it.
        wanted: How the evaluation's batches are made.
        words: The same, described.

    Raises:
        ProbeError: If not: with tensors at other places, or shares of several classes where evaluation has a class.
    """
    kinds = kinds_of(batch)
    if set(kinds) != set(wanted):
        raise ProbeError(
            f"{what}: batches with {described(batch)}, those of the evaluation loader have {words}; labelled data "
            "travel through the evaluation step only where both are made alike."
        )
    for path, (floating, dimensions) in kinds.items():
        was_floating, expected = wanted[path]
        if floating and not was_floating and dimensions > expected:
            raise ProbeError(
                f"{what}: batches with {described(batch)}, those of the evaluation loader have {words}; at "
                f"{shown(path)} evaluation has classes, these have shares of several: samples that were mixed "
                "(MixUp, CutMix) are none of the model's own."
            )


def training_data(trainer: Any, limit: int, seed: int) -> Any:
    """A loader of its own over a seeded choice of the training samples; None where there is no such data set.

    The running training loader is not touched: with persistent workers a second iterator would end the first. Where it
    has workers this one has one, too: handles that a data set opens when it is first read are not this process's.

    Args:
        trainer: Its training loader.
        limit: How many samples; of a data set of ready batches the loader has all, in a seeded order.
        seed: Of the choice, out of those samples that the training sampler draws from.
    """
    loader = trainer.train_dataloader
    data: Any = getattr(loader, "dataset", None)
    # Lists will do, and data sets of other libraries.
    indexed = hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, IterableDataset)
    if not isinstance(loader, DataLoader) or not indexed:
        return None
    drawn = _drawn(loader)
    if drawn is None:
        return None
    order = [drawn[i] for i in torch.randperm(len(drawn), generator=seeded(seed)).tolist()]
    made: dict[str, Any] = {"collate_fn": loader.collate_fn}
    if loader.num_workers:
        made |= {"num_workers": 1, "worker_init_fn": loader.worker_init_fn}
        made["multiprocessing_context"] = loader.multiprocessing_context
    if loader.batch_size is None and loader.batch_sampler is None:  # a data set of ready batches
        return DataLoader(Subset(data, order), batch_size=None, **made)
    return DataLoader(Subset(data, sorted(order[:limit])), getattr(loader.batch_sampler, "batch_size", 64), **made)


def _drawn(loader: Any) -> Sequence[int] | None:
    """Numbers of the samples that a loader draws from, as far as torch's own samplers tell; else None."""
    batches, sampler = loader.batch_sampler, loader.sampler
    if batches is not None:
        if type(batches) is not BatchSampler:
            return None
        sampler = batches.sampler
    if isinstance(sampler, DistributedSampler):
        sampler = getattr(sampler.dataset, "_sampler", sampler)  # Lightning deals what a sampler of the user's draws
    if isinstance(sampler, SubsetRandomSampler):
        return [int(i) for i in sampler.indices]
    if isinstance(sampler, WeightedRandomSampler):
        return [int(i) for i in sampler.weights.nonzero()]  # a weight of 0 leaves a sample out
    everything = type(sampler) in (SequentialSampler, RandomSampler) or isinstance(sampler, DistributedSampler)
    return range(len(loader.dataset)) if everything else None
