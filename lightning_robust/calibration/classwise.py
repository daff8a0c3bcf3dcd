"""Calibration class by class: every probability against how often its class is right."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_robust.calibration.reliability import ROUNDING, Reliability, check_confidence, checked_rows

__all__ = ["Classwise"]

CHUNK = 2**21  # probabilities worked on at once


@dataclass(frozen=True, eq=False)
class Classwise:
    """Sums over all probabilities of all classes, one against the rest; and over the likeliest class, by right class.

    The calibration of the likeliest class says nothing about a class that is seldom predicted, and a mean over samples
    little about one that is seldom there. All values of a class that was never right are NaN, and means leave them out.

    Attributes:
        table: For each class and bin of its probability, ``(3, K, M)`` float64: how many, the sum of the probability,
            and how often the class was right. Bins as in :class:`~lightning_robust.calibration.Reliability`.
        by_label: For each right class, ``(3, K)`` float64: how many samples, how many of them were predicted right, and
            the sum of the confidence. Zero where samples have several labels.
        invalid: Rows that hold a probability that is not finite; they are counted here only.

    Example:
        >>> p = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])
        >>> classwise = Classwise.of(p.log(), torch.tensor([0, 0, 0, 1]), bins=2)
        >>> [round(error, 3) for error in classwise.errors.tolist()], round(classwise.ece, 3)
        ([0.275, 0.275], 0.275)
        >>> classwise.accuracy.tolist(), [round(gap, 3) for gap in classwise.gap.tolist()]
        ([1.0, 1.0], [-0.233, -0.4])

    References:
        Nixon et al., `Measuring Calibration in Deep Learning <https://arxiv.org/abs/1904.01685>`_, 2019, equation 2
        (static calibration error).
    """

    table: Tensor
    by_label: Tensor
    invalid: int

    @classmethod
    def zero(cls, classes: int, bins: int = 15) -> Classwise:
        """Nothing counted yet.

        Raises:
            ValueError: If there is not at least one class and one bin.
        """
        if classes < 1 or bins < 1:
            raise ValueError(f"expected at least one class and one bin, got classes={classes} and bins={bins}.")
        return cls.load(torch.zeros(3 * classes * (bins + 1) + 1, dtype=torch.float64), classes)

    @classmethod
    def of(cls, log_probabilities: Tensor, labels: Tensor, bins: int = 15) -> Classwise:
        """Count predictions of one class a sample.

        Args:
            log_probabilities: ``(R, K)``, e.g. of ``log_softmax``; half precision is raised to float32.
            labels: Right classes ``(R,)``, integers in ``[0, K)``.
            bins: How many bins.

        Raises:
            ValueError: If shapes do not fit, a label names no class, or the numbers are no log-probabilities.
        """
        log_p = checked_rows(log_probabilities, labels)
        classes = log_p.shape[1]
        total = cls.zero(classes, bins)
        for some_log_p, some_labels in _chunks(log_p, labels):
            p, right = some_log_p.exp(), some_labels.long().cpu()
            confidence, predicted = p.max(1)
            check_confidence(confidence)
            # Doubles on the CPU: not every device has them, and weighted counts on CUDA vary from run to run.
            p, confidence, predicted = p.cpu(), confidence.cpu(), predicted.cpu()
            valid = p.isfinite().all(1)
            p, right, confidence, hit = p[valid], right[valid], confidence[valid], (predicted == right)[valid]
            where = _where(p, bins)
            by_label = torch.stack(
                [
                    torch.bincount(right, minlength=classes).double(),
                    torch.bincount(right[hit], minlength=classes).double(),
                    torch.bincount(right, confidence.double(), classes),
                ]
            )
            table = _table(where, p, where.gather(1, right[:, None]), (classes, bins))
            total += cls(table, by_label, int((~valid).sum()))
        return total

    @classmethod
    def of_labels(cls, probabilities: Tensor, labels: Tensor, bins: int = 15) -> Classwise:
        """Count predictions of several labels a sample.

        Args:
            probabilities: Of each label, ``(N, K)`` in [0, 1].
            labels: Whether each applies, ``(N, K)``, bool or 0/1.
            bins: How many bins.

        Raises:
            ValueError: If shapes do not fit, or numbers are no probabilities.
        """
        if probabilities.ndim != 2 or labels.shape != probabilities.shape:
            raise ValueError(
                "expected probabilities and labels (N, K), got "
                f"{tuple(probabilities.shape)} and {tuple(labels.shape)}; for one class a sample use Classwise.of."
            )
        outside = probabilities[(probabilities < 0) | (probabilities > 1)]
        if len(outside):
            raise ValueError(
                f"expected probabilities in [0, 1], got {float(outside[0]):.3g}; for logits take a sigmoid first."
            )
        p = probabilities.detach()
        p = p if p.dtype == torch.float64 else p.float()
        classes = p.shape[1]
        total = cls.zero(classes, bins)
        for some_p, some_labels in _chunks(p, labels):
            some_p, applies = some_p.cpu(), some_labels.cpu() > 0.5
            valid = some_p.isfinite().all(1)
            where = _where(some_p[valid], bins)
            table = _table(where, some_p[valid], where[applies[valid]], (classes, bins))
            total += cls(table, torch.zeros_like(total.by_label), int((~valid).sum()))
        return total

    def __add__(self, other: Classwise) -> Classwise:
        if self.table.shape != other.table.shape:
            raise ValueError(
                "expected the same classes and bins, got "
                f"{tuple(self.table.shape[1:])} and {tuple(other.table.shape[1:])}."
            )
        return Classwise(self.table + other.table, self.by_label + other.by_label, self.invalid + other.invalid)

    def state(self) -> Tensor:
        """Everything, ``(3 K (M + 1) + 1,)`` doubles to be summed over processes; counts stay exact up to 2**53."""
        return torch.cat([self.table.flatten(), self.by_label.flatten(), self.table.new_tensor([self.invalid])])

    @classmethod
    def load(cls, state: Tensor, classes: int) -> Classwise:
        """The sums that :meth:`state` wrote, or several of them added.

        Raises:
            ValueError: If the length is not that of a state of so many classes.
        """
        bins, rest = divmod(len(state) - 1, 3 * classes)
        if state.ndim != 1 or bins < 2 or rest:
            raise ValueError(f"expected a state of 3 K (M + 1) + 1 numbers for K={classes}, got {tuple(state.shape)}.")
        state = state.detach().cpu().double()
        by_label = state[-3 * classes - 1 : -1].view(3, classes).clone()
        return cls(state[: -3 * classes - 1].view(3, classes, bins - 1).clone(), by_label, int(state[-1]))

    @property
    def errors(self) -> Tensor:
        """Calibration error of each class against the rest, ``(K,)`` doubles in [0, 1]."""
        counts, probability, events = self.table
        errors: Tensor = (probability - events).abs().sum(1) / counts.sum(1)
        return errors.where(events.sum(1) > 0, math.nan)

    @property
    def ece(self) -> float:
        """Mean of :attr:`errors` over the classes that were ever right, in [0, 1]."""
        return float(self.errors.nanmean())

    def worst(self) -> tuple[int, float]:
        """The class with the largest of :attr:`errors`, and its error; ``(-1, nan)`` where nothing was counted."""
        errors = self.errors
        if bool(errors.isnan().all()):
            return -1, math.nan
        at = int(errors.nan_to_num(-1.0).argmax())
        return at, float(errors[at])

    def of_class(self, k: int) -> Reliability:
        """The bins of one class against the rest, e.g. for its diagram; without loss and Brier score, which are NaN."""
        counts, probability, events = self.table[:, k]
        return Reliability(counts.long(), probability, events.long(), math.nan, math.nan, math.nan, self.invalid)

    @property
    def accuracy(self) -> Tensor:
        """Share of the samples of each right class that is predicted right, ``(K,)`` doubles in [0, 1]."""
        return self.by_label[1] / self.by_label[0]

    @property
    def gap(self) -> Tensor:
        """Mean confidence minus accuracy of the samples of each right class, ``(K,)`` doubles in [-1, 1].

        Above 0 the model is surer than right on this class. A good model has gaps too: it cannot know the right class,
        and is less often right on rare ones. The differences between classes are what to look at.
        """
        return (self.by_label[2] - self.by_label[1]) / self.by_label[0]


def _chunks(values: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, CHUNK // max(1, values.shape[1]))
    for start in range(0, len(values), size):
        yield values[start : start + size], labels[start : start + size]


def _where(p: Tensor, bins: int) -> Tensor:
    """Bin of each probability ``(R, K)``, counted on from class to class."""
    bin_ = ((p - ROUNDING) * bins).ceil_().sub_(1).clamp_(0, bins - 1).long()
    return bin_.add_(bins * torch.arange(p.shape[1]))


def _table(where: Tensor, p: Tensor, events: Tensor, shape: tuple[int, int]) -> Tensor:
    """How many probabilities, their sum, and how many ``events`` there are at each place, ``(3, *shape)`` doubles."""
    size = shape[0] * shape[1]
    counts = torch.bincount(where.flatten(), minlength=size)
    total = torch.bincount(where.flatten(), p.flatten().double(), size)
    happened = torch.bincount(events.flatten(), minlength=size)
    return torch.stack([counts.double(), total, happened.double()]).view(3, *shape)
