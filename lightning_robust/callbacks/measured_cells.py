"""All cells of one evaluation: what is counted of each of them, and what that says over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attach.everyone import Everyone
from lightning_robust.attach.groups import Groups, GroupSums, parts
from lightning_robust.attach.labelled import read_labelled
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.step import Step
from lightning_robust.calibration import Reliability
from lightning_robust.callbacks.shift_cells import CLEAN, Cell
from lightning_robust.callbacks.shifted import LOG_PROBABILITIES, Shifted, at_temperature
from lightning_robust.losses import LossCall
from lightning_robust.metrics import UnderAttack

__all__ = ["MeasuredCells", "check_first", "metrics_of", "other_data", "update"]


class MeasuredCells:
    """What is counted of one evaluation.

    Args:
        corrupted: Cells of corruptions, in one order on all processes, which sum one cell after the other.
        often: Those of them that every evaluation measures.
        loaders: Names of loaders of other data.
        scores: Names of the scores that tell shifted from clean samples.
        metrics: torchmetrics objects by name.
        groups: Of the samples, if they have any.
        capacity: Samples of each cell, at most.
        seed: Of what is kept.
        warn: ``(message, about)``, once.
    """

    def __init__(
        self,
        corrupted: Sequence[Cell],
        often: Sequence[Cell],
        loaders: Sequence[str],
        scores: Sequence[str],
        metrics: Mapping[str, Any],
        groups: Groups | None,
        capacity: int,
        seed: int,
        warn: Callable[..., None],
    ) -> None:
        self.corrupted, self.often, self.metrics = list(corrupted), set(often), metrics
        self.scores, self.warn, self.capacity = scores, warn, capacity
        cells = [CLEAN, *corrupted, *map(Cell, loaders)]
        self._cells = {cell: Shifted(scores, capacity, len(cells), seed) for cell in cells}
        self._other = metrics_of(cells, metrics)
        self._drops_rows = False  # whether the step drops rows before its loss, as far as was seen
        self._by_group = None if groups is None else GroupSums(groups, 4)

    def add(self, cell: Cell, call: LossCall, index: Tensor, keep: Tensor, codes: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            cell: Where it belongs.
            call: What the model said.
            index: Number of each sample, ``(N,)``.
            keep: Which samples count, ``(N,)``.
            codes: The group of each sample, ``(N,)``, of a corruption.
        """
        call = call.detached()
        if "energy" in self.scores and call.kind in LOG_PROBABILITIES:
            self.warn(f"the loss ({call.kind}) gets log-probabilities, which have no energy; use msp.")
        self._drops_rows = self._drops_rows or drops_rows(call, len(keep))
        if self._drops_rows:
            if not self._cells[cell].sums.n and bool((index < self.capacity).any()):
                check_first(call, index, self.capacity)
            whole = bool(keep.all())
            if codes is not None or not whole:
                self.warn(
                    f"the step drops rows before its loss ({call.kind} gets {len(call.logits)} rows for {len(keep)} "
                    "samples), so that nobody can tell whose they are: batches are measured whole, as long as all of "
                    f"their samples are among the first {self.capacity}, and without groups.",
                    "rows that were dropped",
                )
            keep, codes = torch.full_like(keep, whole), None
        update(self._other, cell, call, keep)
        right, place = self._cells[cell].add(call, index, keep)
        if self._by_group is not None and codes is not None:
            for code, members in parts(codes[place]):
                sums = torch.stack([members.sum().double(), right[members].double().sum()])
                self._by_group.add(code, torch.cat([sums * (cell in self.often), sums]))

    def measures(
        self, everyone: Everyone, temperature: float | None, device: torch.device
    ) -> dict[Cell, dict[str, float]]:
        """Values by metric of each cell that has a sample; to be called by all processes.

        Args:
            everyone: All processes.
            temperature: Of the clean data.
            device: Where processes talk to each other.
        """
        reduce, trainer = everyone.reduce, everyone.trainer
        rows = {
            cell: shifted.everyones(reduce, trainer.global_rank, trainer.world_size)
            for cell, shifted in self._cells.items()
        }
        found: dict[Cell, dict[str, float]] = {}
        for cell, shifted in self._cells.items():
            scaled = None
            if temperature is not None:
                own = at_temperature(temperature, rows[cell])
                scaled = own if reduce is None else Reliability.load(reduce(own.state()))
            if shifted.sums.n or shifted.sums.invalid:
                found[cell] = shifted.measures(self._cells[CLEAN], scaled)
        for name, metric in self._other.items():
            values = metric.compute(everyone.summed(metric.state()), device)
            for cell in self._cells:
                if f"{name}_{cell.key}" in values:
                    found.setdefault(cell, {})[name] = values[f"{name}_{cell.key}"]
        return found

    def groups(self, everyone: Everyone) -> dict[str, Tensor]:
        """Samples and right ones by name of the group, ``(4,)``: of often measured cells, and of all."""
        return {} if self._by_group is None else self._by_group.everyones(everyone.trainer, everyone.summed)

    @property
    def n(self) -> int:
        """How many clean predictions were counted."""
        return self._cells[CLEAN].sums.n

    def say_invalid(self, stage: str) -> None:
        """Warn of predictions that are NaN or infinite, after :meth:`measures`."""
        invalid = {cell.key: shifted.sums.invalid for cell, shifted in self._cells.items() if shifted.sums.invalid}
        if invalid:
            silent = sum(not self._cells[cell].sums.n for cell in self.corrupted)
            self.warn(
                f"{sum(invalid.values())} predictions of {stage} are NaN or infinite and left out, of "
                f"{', '.join(f'{key} {n}' for key, n in list(invalid.items())[:5])}"
                f"{f' and {len(invalid) - 5} more' if len(invalid) > 5 else ''}."
                f"{f' Cells of which nothing is left ({silent}) are no part of any mean.' if silent else ''}",
                f"invalid in {stage}",
            )


def other_data(
    trainer: Any, probe: Probe, step: Step, name: str, source: Any, limit: int, seed: int
) -> Iterator[tuple[LossCall, Tensor, Tensor]]:
    """What the evaluation step says of a loader of other data; number and whether it counts of each sample, ``(N,)``.

    Args:
        trainer: Its hooks, its device and its processes.
        probe: How steps are read.
        step: The evaluation step with a batch of its own.
        name: Of the loader.
        source: A data set or any iterable of batches.
        limit: Stop after so many samples.
        seed: Of the choice.

    Raises:
        ValueError: If its labels are none of this model's.
    """
    what = f"shift_loaders[{name!r}]"
    for reading, index, counts in read_labelled(trainer, probe, step, source, limit, what, seed):
        call = reading.read(reading.x)
        try:
            call.rows()  # says if the labels are none of this model's
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
        yield call, index, counts


def drops_rows(call: LossCall, n: int) -> bool:
    """Whether the rows of a loss cannot be told by sample: fewer than ``n``, or not as many for each of them."""
    return len(call.logits) < n or len(call.logits) % n > 0


def check_first(call: LossCall, index: Tensor, limit: int) -> None:
    """Whether something of the first batch can be measured.

    Raises:
        ValueError: If its rows cannot be told by sample, and not all of it is to be measured.
    """
    if drops_rows(call, len(index)) and not bool((index < limit).all()):
        raise ValueError(
            f"the step drops rows before its loss ({call.kind} gets {len(call.logits)} rows for {len(index)} samples), "
            f"so that batches are measured whole or not at all: max_samples={limit} is less than the first one; give "
            f"max_samples={int(index.max()) + 1} or more."
        )


def metrics_of(cells: Sequence[Cell], metrics: Mapping[str, Any]) -> dict[str, UnderAttack]:
    """The user's own metrics by name, in each of the cells."""
    keys = [cell.key for cell in cells]
    return {name: UnderAttack(keys, {name: metric}, calibration=False) for name, metric in metrics.items()}


def update(metrics: Mapping[str, UnderAttack], cell: Cell, call: LossCall, keep: Tensor) -> None:
    """Hand a batch to the user's own metrics.

    Raises:
        ValueError: If predictions do not belong to samples, or a metric fails.
    """
    if not metrics:
        return
    if drops_rows(call, len(keep)):
        raise ValueError(
            f"metrics= takes predictions that belong to samples, but the loss ({call.kind}) gets {len(call.logits)} "
            f"rows for {len(keep)} samples; leave metrics= out."
        )
    if not bool(keep.any()):
        return
    rows = keep.repeat_interleave(len(call.logits) // len(keep))
    for name, metric in metrics.items():
        try:
            metric.update(cell.key, call, rows)
        except Exception as error:  # whatever a metric of the user's raises
            raise ValueError(
                f"metrics[{name!r}] failed on probabilities {tuple(call.probabilities().shape)} and labels "
                f"{tuple(call.labels().shape)} ({type(error).__name__}: {error}); give one that takes these."
            ) from error
