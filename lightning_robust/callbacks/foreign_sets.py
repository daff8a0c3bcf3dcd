"""Foreign inputs of an evaluation, read through the user's own step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from lightning_robust.attach.batches import Path, get, leaves, rebuilt, resized
from lightning_robust.attach.features import Caught
from lightning_robust.attach.foreign import foreign_input, foreign_loader, through_hooks
from lightning_robust.attach.loaders import own_batches, true_length
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.step import Step
from lightning_robust.losses import LossCall

__all__ = ["ForeignSets", "Read", "check_sets", "find_input", "known", "plainly"]

RESERVED = ("near", "far", "accepted", "group", "thresholds", "detectors", "measured_step", "attacked")

Run = Callable[..., tuple[LossCall, Caught | None]]
"""``(module, forward)`` to what the forward said, and the features that were caught in it."""


@dataclass(frozen=True, eq=False)
class Read:
    """A foreign batch that was read.

    Attributes:
        call: What the model said.
        caught: What went into its last layer, where that is wanted.
        index: Number of each sample in its set, ``(N,)``.
        counts: Whether it counts, ``(N,)``.
    """

    call: LossCall
    caught: Caught | None
    index: Tensor
    counts: Tensor


class ForeignSets:
    """Named data sets and loaders of foreign inputs.

    Args:
        sets: By name.
        limit: Samples of each; a seeded choice of a data set, the first ones of a loader.
        seed: Of the choice.
    """

    def __init__(self, sets: Mapping[str, Any], limit: int, seed: int) -> None:
        self.sets, self.limit, self.seed = sets, limit, seed

    def read(
        self, trainer: Any, probe: Probe, step: Step, name: str, run: Run, limit: int | None = None
    ) -> Generator[Read, None, None]:
        """What the step says of the batches of a set."""
        route = probe.route(step, listening=True)
        like = get(step.batch, route.input)
        loader = foreign_loader(self.sets[name], len(like), self.limit, self.seed)
        length = true_length(loader, trainer.world_size)
        for batch, index in own_batches(trainer, loader, self.limit if limit is None else limit):
            moved = through_hooks(trainer, step, batch, like, route.input)
            if moved is not None and not like.is_floating_point():
                # Texts are no texts without their own masks; only what they are labelled with is not asked for.
                targets = _targets(step, route.target, len(like), len(index))
                with probe.reading(step.with_batch(rebuilt(moved, targets)), listening=True) as reading:
                    call, caught = run(step.module, partial(reading.read, reading.x))
            else:
                found = None if moved is None else get(moved, route.input)
                foreign = foreign_input(batch, found, like, f"OOD set {name!r}")
                with probe.reading(step, listening=True) as reading:
                    call, caught = run(step.module, partial(reading.read, foreign))
            yield Read(call, caught, index, index < length)

    def rehearse(self, trainer: Any, probe: Probe, step: Step) -> None:
        """Read one batch of each set: whether it is made as this model needs it.

        Raises:
            ValueError: If a set has no batch.
        """
        for name in self.sets:
            with closing(self.read(trainer, probe, step, name, plainly, 1)) as read:
                first = next(read, None)
            if first is None and trainer.world_size == 1:  # of several processes one may well have no batch
                raise ValueError(
                    f"OOD set {name!r}: expected foreign inputs, got no batch at all. Give a data set or loader "
                    "that is not empty (drop_last=False where it holds less than a batch), or leave it out."
                )


def plainly(module: Any, run: Callable[[], LossCall]) -> tuple[LossCall, Caught | None]:
    """Run a forward that nobody wants features of."""
    return run(), None


def find_input(probe: Probe, step: Step) -> None:
    """Where no gradient tells, the input is the largest of what has a row for every sample and is no target."""
    route = probe.route(step, listening=True)
    if route.differentiable:
        return
    n = len(get(step.batch, route.input))
    rows = [(path, x) for path, x in leaves(step.batch) if isinstance(x, Tensor) and x.ndim and len(x) == n]
    fits = [(path, x) for path, x in rows if path != route.target]
    largest = max(fits, key=lambda row: row[1].ndim, default=(route.input, None))[0]  # of several, the first
    probe.routes[step.name] = replace(route, input=probe.input_paths[0] if probe.input_paths else largest)


def _targets(step: Step, path: Path | None, n: int, wanted: int) -> Mapping[Path, Any]:
    """The targets of the step's own batch, for another number of samples."""
    return {} if path is None else {path: get(resized(step.batch, n, wanted), path)}


def check_sets(sets: Any) -> None:
    """Whether sets have names that are theirs alone, and can be iterated again; None will do.

    Raises:
        TypeError: If they have no names, or one is neither a data set nor something to iterate.
        ValueError: If not, or if there is none.
    """
    if sets is not None and not isinstance(sets, Mapping):
        raise TypeError(
            f"sets= takes names and data sets, OODMonitor({{'other': loader}}); got a {type(sets).__name__}."
        )
    if sets is not None and not sets:
        raise ValueError("OODMonitor needs at least one set, or sets=None for synthetic ones.")
    for key, source in (sets or {}).items():
        if key in RESERVED:
            raise ValueError(f"an OOD set cannot be called {key!r}, which means something else in its keys; rename it.")
        if isinstance(source, (Tensor, np.ndarray, Mapping, str)) or not _has_batches(source):
            raise TypeError(
                f"OOD set {key!r}: expected a data set, a DataLoader or a list of batches, got a "
                f"{type(source).__name__}. Tensors of inputs become a data set by TensorDataset(x); what is not to be "
                "measured is left out of sets=."
            )
        if hasattr(source, "__next__"):
            raise ValueError(
                f"OOD set {key!r} is an iterator, which can be iterated once only; give a data set, a list or a "
                "DataLoader, which every evaluation can go through."
            )


def _has_batches(source: Any) -> bool:
    return hasattr(source, "__iter__") or hasattr(source, "__getitem__")


def known(what: str, names: Sequence[str], sets: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of sets.

    Raises:
        ValueError: If one is unknown.
    """
    unknown = [name for name in ([names] if isinstance(names, str) else names) if name not in sets]
    if isinstance(names, str) or unknown:
        raise ValueError(f"{what}= takes a list of names of sets ({', '.join(sets)}), got {names!r}.")
    return tuple(names)
