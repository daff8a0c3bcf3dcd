"""One kind of shift in an evaluation: what the model says of samples that were corrupted, or come from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_robust.calibration import Reliability
from lightning_robust.losses import LossCall
from lightning_robust.metrics import Reservoir, ScoreTable
from lightning_robust.ood import scores_named, separation

__all__ = ["KEPT", "MEASURES", "Shifted", "at_temperature", "counted_rows", "finite_rows"]

KEPT = 20_000  # predictions a cell, for the calibration error at a temperature that is known in the end only
LARGEST = 50_000_000  # numbers kept of all cells, 200 MB
LOG_PROBABILITIES = ("nll_loss", "kl_div")  # losses that get these
MEASURES = ("accuracy", "nll", "ece", "ece_floor", "confidence", "ece_scaled", "nll_scaled")


class Shifted:
    """What was counted of one cell.

    Args:
        scores: Names of the scores that tell shifted from clean samples.
        capacity: Samples, at most.
        cells: How many cells share the memory.
        seed: Of what is kept.
    """

    def __init__(self, scores: Sequence[str], capacity: int, cells: int, seed: int) -> None:
        self.sums = Reliability.zero()
        self.kept = Reservoir(KEPT, seed, LARGEST // max(1, cells))
        self.table = ScoreTable(list(scores), capacity) if scores else None
        self._scores = scores_named(scores) if scores else {}

    def add(self, call: LossCall, index: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Count a batch.

        Args:
            call: What the model said.
            index: Number of each sample, ``(N,)``.
            keep: Which samples count, ``(N,)``.

        Returns:
            Of each prediction that was counted whether it is right ``(R,)``, and the place of its sample in the batch
            ``(R,)``.
        """
        log_p, labels, place = counted_rows(call, keep)
        self.sums = self.sums + Reliability.of(log_p, labels)
        self.kept.add(log_p, labels, index[place])
        if self.table is not None:
            scores = self._scores_of(call, len(index))
            if scores:
                self.table.add(index[keep], {name: values[keep] for name, values in scores.items()})
        # As Reliability has it: a right class that was ruled out is an answer, and a wrong one.
        valid = log_p.amax(1).isfinite()
        return (log_p.argmax(1) == labels)[valid].cpu(), place[valid.cpu()]

    def _scores_of(self, call: LossCall, n: int) -> dict[str, Tensor]:
        """Scores of ``n`` samples, if each of them is one prediction."""
        logits = call.class_logits()
        if logits is None and call.kind in LOG_PROBABILITIES and call.logits.ndim == 2:
            logits = call.logits.float()
        if logits is None or len(logits) != n:
            return {}
        scores = {name: score(logits).cpu() for name, score in self._scores.items()}
        if call.kind in LOG_PROBABILITIES and "energy" in scores:
            scores["energy"] = torch.full((n,), math.nan)  # that of log-probabilities is 0, up to round-off
        return scores

    def everyones(self, summed: Callable[[Tensor], Tensor] | None, rank: int, world: int) -> tuple[Tensor, ...]:
        """Take over the sums of all processes; the rows that this process keeps."""
        if summed is not None:
            self.sums = Reliability.load(summed(self.sums.state()))
            if self.table is not None:
                self.table.load(summed(self.table.state()))
        return self.kept.rows(summed, rank, world)

    def measures(self, clean: Shifted, scaled: Reliability | None) -> dict[str, float]:
        """All values by metric.

        Args:
            clean: The same of samples without a shift.
            scaled: Counted at the temperature of data without a shift.
        """
        sums = self.sums
        values = {"accuracy": sums.accuracy, "nll": sums.mean_nll, "ece": sums.ece, "ece_floor": sums.floor()}
        values["confidence"] = sums.mean_confidence
        if scaled is not None and scaled.n:
            values |= {"ece_scaled": scaled.ece, "nll_scaled": scaled.mean_nll}
        if self.table is not None and clean.table is not None and self.table.n and clean.table.n:
            for name in self._scores:
                inside, outside = (table.of(name)[table.of(name).isfinite()] for table in (clean.table, self.table))
                if len(inside) and len(outside):
                    values[f"{name}_auroc"] = separation(inside, outside)["auroc"]
        return values


def at_temperature(temperature: float, rows: tuple[Tensor, ...]) -> Reliability:
    """Rows counted at a temperature."""
    log_p, labels = rows[:2]
    if not len(labels):
        return Reliability.zero()
    return Reliability.of((log_p.float() / temperature).log_softmax(1), labels)


def counted_rows(call: LossCall, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities ``(R, K)``, labels ``(R,)`` and places in the batch ``(R,)`` of the predictions that count.

    Args:
        call: What the model said.
        keep: Which samples count, ``(N,)``, on the CPU.
    """
    log_p, labels, row = call.rows()
    each = max(1, len(call.logits) // max(1, len(keep)))  # rows a sample, where the loss gets them flattened
    place = (row // each).clamp(max=len(keep) - 1).cpu()
    kept = keep[place]
    on_device = kept.to(log_p.device)
    return log_p[on_device], labels[on_device], place[kept]


def finite_rows(rows: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and labels of the rows whose loss is finite, which a temperature can be fitted on."""
    log_p, labels = rows[:2]
    finite = log_p.gather(1, labels.long()[:, None])[:, 0].isfinite()
    return log_p[finite], labels[finite]
