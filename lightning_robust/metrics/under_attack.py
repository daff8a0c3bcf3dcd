"""What other metrics say under attack: confidence, calibration, and any torchmetrics object."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_robust.calibration.reliability import Reliability
from lightning_robust.losses import LossCall

__all__ = ["UnderAttack"]


class UnderAttack:
    """The same metrics on clean inputs and under each attack.

    Args:
        conditions: ``"clean"`` and names of attacks.
        metrics: torchmetrics objects by name, taking ``(probabilities, labels)``; each condition has copies of its own.
        calibration: Whether mean confidence and calibration error are measured.

    Example:
        >>> from torchmetrics.classification import MulticlassF1Score
        >>> measured = UnderAttack(["clean", "pgd"], {"f1": MulticlassF1Score(2, average="micro")}, calibration=True)
        >>> call = LossCall("cross_entropy", torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
        >>> measured.update("pgd", call, torch.tensor([True, True]))
        >>> {name: round(value, 3) for name, value in measured.compute(measured.state()).items()}
        {'confidence_pgd': 0.881, 'ece_pgd': 0.381, 'f1_pgd': 0.5}
    """

    def __init__(self, conditions: Sequence[str], metrics: Mapping[str, Any], calibration: bool) -> None:
        self.conditions = list(conditions)
        self.calibration = calibration
        self._metrics = {c: {name: metric.clone() for name, metric in metrics.items()} for c in conditions}
        self._counts = dict.fromkeys(conditions, 0)
        self._reliability = {condition: Reliability.zero().state() for condition in conditions}

    @property
    def counts_anything(self) -> bool:
        """Whether there is anything to measure."""
        return self.calibration or any(self._metrics.values())

    def update(self, condition: str, call: LossCall, keep: Tensor) -> None:
        """Count a batch.

        Args:
            condition: Which one.
            call: What the model said.
            keep: Which samples count, ``(N,)``.
        """
        if not self.counts_anything or not bool(keep.any()):  # some metrics fail on nothing
            return
        self._counts[condition] += int(keep.sum())
        for metric in self._metrics[condition].values():
            rows = keep.to(call.logits.device)
            # Not logits: torchmetrics takes those of a batch that happen to lie in [0, 1] for probabilities.
            metric.to(call.logits.device).update(call.probabilities().detach()[rows], call.labels()[rows])
        if self.calibration:
            log_p, labels, sample = call.rows()
            counted = keep.to(sample.device)[sample]
            self._reliability[condition] += Reliability.of(log_p[counted], labels[counted]).state().cpu()

    def state(self) -> Tensor:
        """What is to be summed over processes, doubles ``(conditions, ...)``; torchmetrics sums its own."""
        rows = [torch.cat([c.new_tensor([self._counts[n]]), c]) for n, c in self._reliability.items()]
        return torch.stack(rows)

    def compute(self, state: Tensor, device: torch.device | None = None) -> dict[str, float]:
        """All values, by metric and condition; those of conditions without a sample are left out.

        Args:
            state: Summed over processes.
            device: Where processes talk to each other: torchmetrics of one that had no sample are still on the CPU.
        """
        values: dict[str, float] = {}
        for condition, total in zip(self.conditions, state, strict=True):
            if not total[0]:  # on no process
                continue
            reliability = Reliability.load(total[1:])
            if self.calibration:
                values[f"confidence_{condition}"] = reliability.mean_confidence
                values[f"ece_{condition}"] = reliability.ece
            for name, metric in self._metrics[condition].items():
                moved = metric if device is None else metric.to(device)
                values[f"{name}_{condition}"] = _one_number(name, moved.compute())
        return values

    def check(self) -> None:
        """Whether the metrics are of one number each, as far as the samples so far can tell.

        Raises:
            ValueError: If one is not.
        """
        for name, metric in self._metrics[self.conditions[0]].items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    value = metric.compute()
                except (ArithmeticError, RuntimeError, ValueError):
                    continue  # there may be too few samples for it yet
            _one_number(name, value)


def _one_number(name: str, value: Any) -> float:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"metrics= takes metrics of one number each, but {name!r} computes {got}.")
    return float(value)
