"""A fine grid of confidences: equal-mass calibration error and risk against coverage, from sums of fixed size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_robust.calibration.reliability import check_confidence, checked_rows

__all__ = ["ConfidenceGrid"]

CELLS = 4096
# Cell of a logit t of the confidence: round(400 asinh(t / 4)) + 800. Near t = 0 a cell is 0.01 of a logit wide, further
# out 1/400 of t, so that no confidence is too high: the ends are t = -14 (chance among a million classes) and 7000.
# Rounding puts t = 0, the confidence of every even vote, into the middle of a cell.
SOFT, PER_UNIT, ZERO = 4.0, 400.0, 800


@dataclass(frozen=True, eq=False)
class ConfidenceGrid:
    """Sums over single predictions, by 4096 narrow cells of the confidence in the likeliest class.

    The cells lie by the log-odds ``log p - log(1 - p)``, computed from all the other classes: confidences that are all
    1.0 in float32 still have an order. Predictions of equal confidence share a cell, and no measure here splits a cell:
    the order of samples means nothing, and neither do batches or the number of processes. Different confidences in one
    cell count as equal; they are less than 0.003 apart. Means are NaN where nothing was counted.

    Attributes:
        counts: Predictions in each cell, ``(4096,)`` int64, the least sure first.
        confidence: Sums of the confidence, ``(4096,)`` float64.
        correct: How many were right, ``(4096,)`` int64.
        invalid: Rows without a finite confidence; they are counted here only.

    Example:
        >>> p = torch.tensor([[0.8, 0.2], [0.9, 0.1], [0.3, 0.7], [0.4, 0.6]])
        >>> grid = ConfidenceGrid.of(p.log(), torch.tensor([0, 0, 1, 0]))  # only the least sure is wrong
        >>> round(grid.aurc, 4), round(grid.excess_aurc, 4), grid.accuracy_at(0.75)
        (0.0625, 0.0, 1.0)
        >>> round(grid.adaptive(bins=4), 3)
        0.3
    """

    counts: Tensor
    confidence: Tensor
    correct: Tensor
    invalid: int

    @classmethod
    def zero(cls) -> ConfidenceGrid:
        """Nothing counted yet."""
        return cls.load(torch.zeros(3 * CELLS + 1, dtype=torch.float64))

    @classmethod
    def of(cls, log_probabilities: Tensor, labels: Tensor) -> ConfidenceGrid:
        """Count predictions.

        Args:
            log_probabilities: ``(R, K)``, e.g. of ``log_softmax``; half precision is raised to float32. ``-inf`` stands
                for a probability of 0.
            labels: Right classes ``(R,)``, integers in ``[0, K)``.

        Raises:
            ValueError: If shapes do not fit, a label names no class, or the numbers are no log-probabilities.
        """
        log_p = checked_rows(log_probabilities, labels)
        if not len(labels):
            return cls.zero()
        top, predicted = log_p.max(1)
        check_confidence(top.exp())
        rest = log_p.scatter(1, predicted[:, None], -math.inf).logsumexp(1)
        # Numbers per row go to the CPU: not every device has doubles, and weighted counts on CUDA vary from run to run.
        top, rest, right = top.cpu(), rest.cpu(), (predicted == labels).cpu()
        valid = top.isfinite() & ~rest.isnan()
        log_odds, confidence, right = (top - rest)[valid].double(), top[valid].exp().double(), right[valid]
        cell = (PER_UNIT * (log_odds / SOFT).asinh()).round().clamp(-ZERO, CELLS - 1 - ZERO).long() + ZERO
        return cls(
            counts=torch.bincount(cell, minlength=CELLS),
            confidence=torch.bincount(cell, confidence, CELLS),
            correct=torch.bincount(cell[right], minlength=CELLS),
            invalid=len(valid) - len(cell),
        )

    def __add__(self, other: ConfidenceGrid) -> ConfidenceGrid:
        return ConfidenceGrid(
            self.counts + other.counts,
            self.confidence + other.confidence,
            self.correct + other.correct,
            self.invalid + other.invalid,
        )

    def state(self) -> Tensor:
        """Everything, ``(12289,)`` doubles (96 KiB) to be summed over processes; counts stay exact up to 2**53."""
        return torch.cat([self.counts, self.confidence, self.correct, torch.tensor([float(self.invalid)])])

    @classmethod
    def load(cls, state: Tensor) -> ConfidenceGrid:
        """The sums that :meth:`state` wrote, or several of them added.

        Raises:
            ValueError: If the length is not that of a state.
        """
        if state.shape != (3 * CELLS + 1,):
            raise ValueError(f"expected a state of {3 * CELLS + 1} numbers, got {tuple(state.shape)}.")
        state = state.detach().cpu().double()
        counts, confidence, correct = state[:-1].view(3, CELLS).clone()
        return cls(counts.long(), confidence, correct.long(), int(state[-1]))

    @property
    def n(self) -> int:
        """How many predictions were counted, without the invalid ones."""
        return int(self.counts.sum())

    def adaptive(self, bins: int = 15) -> float:
        """Calibration error over bins of equal mass, in [0, 1].

        A bin ends with the cell that fills it to the next ``m / bins`` of all predictions. Where many predictions are
        equally sure, bins are fewer and fuller than asked for: how ties are broken would decide the error otherwise.

        Args:
            bins: How many bins at most.

        Raises:
            ValueError: If there is not at least one bin.

        References:
            Nguyen and O'Connor, `Posterior calibration and exploratory analysis for natural language processing models
            <https://arxiv.org/abs/1508.05154>`_, 2015; edges between values as in Kumar, Liang and Ma, `Verified
            Uncertainty Calibration <https://arxiv.org/abs/1909.10155>`_, 2019.
        """
        if bins < 1:
            raise ValueError(f"expected at least one bin, got bins={bins}; 15 is usual.")
        if not self.n:
            return math.nan
        # In integers: m * n / bins has no exact double.
        last = torch.searchsorted(bins * self.counts.cumsum(0), self.n * torch.arange(1, bins))
        gaps = torch.bincount(torch.bucketize(torch.arange(CELLS), last), self.confidence - self.correct, bins)
        return float(gaps.abs().sum()) / self.n

    def risk_coverage(self) -> tuple[Tensor, Tensor]:
        """How often the model errs where it answers only when it is sure enough.

        Returns:
            Coverage, the share that is answered, and risk, the share of errors among these, ``(C,)`` doubles each: one
            point for each group of equal confidence, from the surest down to all.
        """
        counts, wrong = self._surest_first()
        answered = counts.cumsum(0)
        return answered / max(1, self.n), wrong.cumsum(0) / answered

    @property
    def aurc(self) -> float:
        r"""Area under the risk-coverage curve, in [0, 1]: the mean risk of the surest 1, 2, ... n predictions.

        Within a group of equal confidence it is the mean over all orders, in closed form: after :math:`n_0` predictions
        with :math:`e_0` errors, g of them at an error rate r add

        .. math:: \sum_{j=1}^{g} \frac{e_0 + j r}{n_0 + j} = g r + (e_0 - r n_0) (H_{n_0 + g} - H_{n_0}),

        with harmonic numbers H. A random order of all predictions gives the error rate.

        References:
            Geifman, Uziel and El-Yaniv, `Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers
            <https://arxiv.org/abs/1805.08206>`_, 2019.
        """
        return _area(*self._surest_first())

    @property
    def excess_aurc(self) -> float:
        """:attr:`aurc` minus that of the best order, every right prediction surer than every wrong one; 0 is best."""
        right, n = int(self.correct.sum()), self.n
        return self.aurc - _area(torch.tensor([right, n - right]).double(), torch.tensor([0, n - right]).double())

    def accuracy_at(self, coverage: float) -> float:
        """Accuracy of the surest share of the predictions, in [0, 1]; linear within a group of equal confidence.

        Raises:
            ValueError: If the coverage is not in (0, 1].
        """
        if not 0 < coverage <= 1:
            raise ValueError(f"expected a coverage in (0, 1], the share that is answered, got {coverage}.")
        if not self.n:
            return math.nan
        counts, wrong = self._surest_first()
        answered, errors = (np.concatenate([[0.0], v.cumsum(0).numpy()]) for v in (counts, wrong))
        return 1 - float(np.interp(coverage * self.n, answered, errors)) / (coverage * self.n)

    def coverage_at(self, risk: float) -> float:
        """The largest share that can be answered at no more than this risk, in [0, 1]; 0 if none can.

        Within a group of equal confidence the share is that of a random order, on average.

        Raises:
            ValueError: If the risk is not in [0, 1].
        """
        if not 0 <= risk <= 1:
            raise ValueError(f"expected a risk in [0, 1], the share of errors, got {risk}.")
        if not self.n:
            return math.nan
        counts, wrong = self._surest_first()
        answered, errors = counts.cumsum(0), wrong.cumsum(0)
        held = torch.nonzero(errors / answered <= risk)
        last = int(held[-1]) if len(held) else -1
        if last == len(counts) - 1:
            return 1.0
        before, lost = (float(answered[last]), float(errors[last])) if last >= 0 else (0.0, 0.0)
        rate = float(wrong[last + 1] / counts[last + 1])  # above the risk, or the next group would hold too
        return (before + (risk * before - lost) / (rate - risk)) / self.n

    def _surest_first(self) -> tuple[Tensor, Tensor]:
        """Predictions and errors of the cells that hold any, ``(C,)`` doubles each."""
        filled = self.counts > 0
        wrong = self.counts - self.correct
        return self.counts[filled].double().flip(0), wrong[filled].double().flip(0)


def _area(counts: Tensor, wrong: Tensor) -> float:
    """Mean risk over all coverages, for groups of so many predictions and errors, in this order; NaN without any."""
    counts, wrong = counts[counts > 0], wrong[counts > 0]
    if not len(counts):
        return math.nan
    rate = wrong / counts
    after = counts.cumsum(0)
    before, errors = after - counts, wrong.cumsum(0) - wrong
    harmonic = torch.digamma(after + 1) - torch.digamma(before + 1)
    return float((wrong + (errors - rate * before) * harmonic).sum() / counts.sum())
