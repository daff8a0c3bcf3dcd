"""The predictions of one evaluation that are kept for a fit: which are fitted on, and which are reported on."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attach.everyone import Everyone
from lightning_robust.attach.labelled import read_labelled
from lightning_robust.attach.listener import Heard
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.step import Step
from lightning_robust.callbacks.recalibration import Rows
from lightning_robust.metrics import Reservoir

__all__ = ["KeptRows"]

EVERYTHING = 2**62


class KeptRows:
    """A seeded random sample of all predictions.

    Args:
        capacity: How many are kept.
        seed: Of that sample, and of the split.
        split: Share of the samples that is fitted on; None for all of them.
        apart: Whether predictions on other data are fitted on.
    """

    def __init__(self, capacity: int, seed: int, split: float | None = None, apart: bool = False) -> None:
        self.seed, self.split = seed, split
        self._rows = Reservoir(capacity, seed)
        # Made here where this process will have no batch of validation: all processes do the same together.
        self._apart = Reservoir(capacity, seed) if apart else None
        self.lost = 0  # predictions without a finite loss, after `parted`
        self.unknown = False  # whose rows are whose, in one batch at least
        self._group_of: list[tuple[Tensor, Tensor]] = []  # samples, and their groups

    def add(self, log_p: Tensor, labels: Tensor, sample: Tensor) -> None:
        """Keep log-probabilities ``(R, K)``, labels ``(R,)`` and sample numbers ``(R,)``."""
        self._rows.add(log_p, labels, sample)

    def read_apart(self, trainer: Any, probe: Probe, step: Step, source: Any) -> None:
        """Read the other data through an evaluation step, and keep what it says of them."""
        if self._apart is None:
            return
        for reading, index, counts in read_labelled(trainer, probe, step, source, EVERYTHING, "dataloader"):
            self._apart.add(*Heard(reading.read(reading.x).detached(), reading.x, index, counts).rows)

    def add_groups(self, index: Tensor, codes: Tensor) -> None:
        """Keep the group ``(N,)`` of each of these samples, ``(N,)``."""
        self._group_of.append((index, codes))

    def parted(self, everyone: Everyone) -> tuple[Rows, Rows | None]:
        """Predictions to fit on, and those to report on unless they are the same; to be called by all processes."""
        rows = self._with_groups(self._finite(self._rows, everyone))
        if self._apart is not None:
            return self._finite(self._apart, everyone), rows
        if self.split is None:
            return rows, None
        chosen = rows.half(self.split, self.seed + 1)
        return rows.where(chosen), rows.where(~chosen)

    def _with_groups(self, rows: Rows) -> Rows:
        if not self._group_of or not len(rows):
            return rows
        index, codes = (torch.cat(column) for column in zip(*self._group_of, strict=True))
        order = index.argsort()
        return replace(rows, codes=codes[order][torch.searchsorted(index[order], rows.sample)])

    def _finite(self, reservoir: Reservoir, everyone: Everyone) -> Rows:
        """What was kept and has a finite loss."""
        trainer = everyone.trainer
        rows = Rows(*reservoir.rows(everyone.reduce, trainer.global_rank, trainer.world_size))
        finite = rows.finite()
        lost, left = everyone.total(len(rows) - len(finite), len(finite))
        self.lost += lost
        if lost:
            no = "" if left else "; there is no finite one, and no temperature is fitted"
            what = f"{lost} predictions that a temperature was to be fitted on are NaN or infinite{no}."
            warnings.warn(what, stacklevel=2)
        return finite
