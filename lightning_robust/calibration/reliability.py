"""How often predictions are right, by how sure they are: sums of fixed size, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

__all__ = ["Reliability"]

# A confidence of exactly m/M comes out of log_softmax and exp a few units in the last place off, upwards or downwards.
# It goes to the bin below its edge all the same, on every device.
ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class Reliability:
    """Sums over single predictions, by bins of the confidence in the likeliest class.

    M bins of equal width, ``((m-1)/M, m/M]``: a confidence on an edge belongs to the bin below it, 0 to the first, 1 to
    the last. Sums add up: the order of samples, the batches and the number of processes mean nothing. Counts are
    integers and the other sums are doubles, because sums in float32 lose a third of the error at ten million
    predictions. All means are NaN where nothing was counted.

    Attributes:
        counts: Predictions in each bin, ``(M,)`` int64.
        confidence: Sums of the confidence, ``(M,)`` float64.
        correct: How many were right, ``(M,)`` int64.
        nll: Sum of ``-log p`` of the right class, in nats.
        brier: Sum of the squared errors of all class probabilities, 0..2 each (twice scikit-learn's for two classes).
        invalid: Rows without a finite confidence, loss or Brier score (NaN, infinite); they are counted here only.

    Example:
        >>> p = torch.tensor([[0.8, 0.2], [0.9, 0.1], [0.3, 0.7], [0.4, 0.6]])
        >>> reliability = Reliability.of(p.log(), torch.tensor([0, 0, 1, 0]))
        >>> reliability.n, reliability.accuracy, round(reliability.mean_confidence, 3)
        (4, 0.75, 0.75)
        >>> round(reliability.ece, 3)
        0.3

    References:
        Guo et al., `On Calibration of Modern Neural Networks <https://arxiv.org/abs/1706.04599>`_, 2017, equation 3.
    """

    counts: Tensor
    confidence: Tensor
    correct: Tensor
    nll: float
    brier: float
    invalid: int

    @classmethod
    def zero(cls, bins: int = 15) -> Reliability:
        """Nothing counted yet.

        Raises:
            ValueError: If there is not at least one bin.
        """
        if bins < 1:
            raise ValueError(f"expected at least one bin, got bins={bins}; 15 is usual.")
        return cls.load(torch.zeros(3 * bins + 3, dtype=torch.float64))

    @classmethod
    def of(cls, log_probabilities: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
        """Count predictions.

        Args:
            log_probabilities: ``(R, K)``, e.g. of ``log_softmax``; half precision is raised to float32. ``-inf`` stands
                for a probability of 0.
            labels: Right classes ``(R,)``, integers in ``[0, K)``.
            bins: How many bins.

        Raises:
            ValueError: If shapes do not fit, a label names no class, or the numbers are no log-probabilities.
        """
        if log_probabilities.ndim != 2 or labels.shape != log_probabilities.shape[:1]:
            raise ValueError(
                "expected log-probabilities (R, K) and labels (R,), got "
                f"{tuple(log_probabilities.shape)} and {tuple(labels.shape)}; LossCall.rows() makes them."
            )
        if not len(labels):
            return cls.zero(bins)
        log_p = log_probabilities.detach()
        log_p = log_p if log_p.dtype == torch.float64 else log_p.float()
        classes = log_p.shape[1]
        lost = (labels < 0) | (labels >= classes)
        if bool(lost.any()):
            raise ValueError(
                f"expected labels in [0, {classes}), got {sorted(set(labels[lost].tolist()))[:10]}; leave rows "
                "without a label out, and check the number of classes."
            )
        # Numbers per row go to the CPU: not every device has doubles, and weighted counts on CUDA vary from run to run.
        confidence, correct, nll, brier = (v.cpu() for v in _per_row(log_p, labels.long()))
        valid = confidence.isfinite() & nll.isfinite() & brier.isfinite()
        confidence, correct, nll, brier = confidence[valid], correct[valid], nll[valid], brier[valid]
        if len(confidence) and float(confidence.max()) > 1.01:
            raise ValueError(
                f"expected log-probabilities, at most 0, got {math.log(float(confidence.max())):.3g}; "
                "for logits take log_softmax first."
            )
        zero = cls.zero(bins)
        edges = (torch.arange(1, bins, dtype=torch.float64) / bins + ROUNDING).to(confidence.dtype)
        where = torch.bucketize(confidence, edges)
        return cls(
            counts=zero.counts + torch.bincount(where, minlength=bins),
            confidence=zero.confidence + torch.bincount(where, confidence.double(), bins),
            correct=zero.correct + torch.bincount(where[correct], minlength=bins),
            nll=float(nll.sum(dtype=torch.float64)),
            brier=float(brier.sum(dtype=torch.float64)),
            invalid=int((~valid).sum()),
        )

    def __add__(self, other: Reliability) -> Reliability:
        if len(self.counts) != len(other.counts):
            raise ValueError(f"expected the same bins, got {len(self.counts)} and {len(other.counts)}.")
        return Reliability(
            self.counts + other.counts,
            self.confidence + other.confidence,
            self.correct + other.correct,
            self.nll + other.nll,
            self.brier + other.brier,
            self.invalid + other.invalid,
        )

    def state(self) -> Tensor:
        """Everything, ``(3 M + 3,)`` doubles to be summed over processes; counts stay exact up to 2**53."""
        rest = torch.tensor([self.nll, self.brier, self.invalid], dtype=torch.float64)
        return torch.cat([self.counts.double(), self.confidence, self.correct.double(), rest])

    @classmethod
    def load(cls, state: Tensor) -> Reliability:
        """The sums that :meth:`state` wrote, or several of them added.

        Raises:
            ValueError: If the length is not that of a state.
        """
        bins, rest = divmod(len(state) - 3, 3)
        if state.ndim != 1 or bins < 1 or rest:
            raise ValueError(f"expected a state of 3 M + 3 numbers, got {tuple(state.shape)}.")
        state = state.detach().cpu().double()
        counts, confidence, correct = state[:-3].view(3, bins).clone()
        nll, brier, invalid = state[-3:].tolist()
        return cls(counts.long(), confidence, correct.long(), nll, brier, int(invalid))

    @property
    def n(self) -> int:
        """How many predictions were counted, without the invalid ones."""
        return int(self.counts.sum())

    @property
    def accuracy(self) -> float:
        """Share that is right, in [0, 1]."""
        return self._mean(float(self.correct.sum()))

    @property
    def mean_confidence(self) -> float:
        """Mean confidence, in [0, 1]; above :attr:`accuracy` the model is over-confident."""
        return self._mean(float(self.confidence.sum()))

    @property
    def mean_nll(self) -> float:
        """Mean negative log-likelihood, in nats."""
        return self._mean(self.nll)

    @property
    def mean_brier(self) -> float:
        """Mean Brier score, in [0, 2]."""
        return self._mean(self.brier)

    @property
    def ece(self) -> float:
        """Expected calibration error, in [0, 1]: the mean gap between confidence and accuracy of a bin.

        It is above 0 for a perfect model too; see :meth:`floor`.
        """
        return self._mean(float((self.confidence - self.correct).abs().sum()))

    def interval(self, level: float = 0.95, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
        r"""Lowest and highest true calibration error that go with these counts.

        The true error is that of the same bins with endless data. Let bin m hold the share :math:`w_m`, with an
        observed gap :math:`X_m`, a true one :math:`\delta_m` and noise :math:`X_m - \delta_m`. Resampling would centre
        on an error that the noise has already raised; two inequalities do without.

        *Lower end*: :math:`\sum w |X| - \sum w |\delta| \le \sum w |X - \delta|`, so the observed error minus the upper
        quantile of the weighted noise is too high only as often as the level says. The noise is binomial, with the
        accuracies smoothed to ``(k + 2) / (n + 4)`` (Agresti and Coull 1998): a bin that is always right is not free
        of doubt. With the milder ``(k + 1/2) / (n + 1)``, 50 confident predictions get a 95 % interval that holds
        in 80 %.

        *Upper end*: :math:`\mathbb{E} |X| \ge |\delta|` (Jensen), so the observed error is on average too high, never
        too low, and varies by at most :math:`\sqrt{\sum w^2 \mathrm{Var} X}`.

        Both ends are conditional on the confidences, and on the wide side; only where all of some 20 predictions fall
        into one bin the interval holds a little less often than it says (92 % for 95 %). The lower end of a perfect
        model is mostly 0.

        Args:
            level: How often the interval holds the true error.
            draws: Random draws.
            seed: Of the draws; global random streams are not touched.

        Returns:
            ``(low, high)``, within [0, 1].
        """
        if not self.n:
            return math.nan, math.nan
        counts, share = self._filled()
        right = self.correct.numpy()[self.counts.numpy() > 0]
        accuracy = (right + 2) / (counts + 4)
        drawn = np.random.default_rng(seed).binomial(counts, accuracy, size=(draws, len(counts)))
        noise = np.abs(drawn / counts - accuracy) @ share
        spread = math.sqrt(float(np.sum(share**2 * accuracy * (1 - accuracy) / counts)))
        low = self.ece - float(np.quantile(noise, (1 + level) / 2))
        high = self.ece + NormalDist().inv_cdf((1 + level) / 2) * spread
        return max(0.0, low), min(1.0, high)

    def floor(self, draws: int = 1000, seed: int = 0) -> float:
        """The :attr:`ece` that a perfectly calibrated model with these confidences would show on average.

        Args:
            draws: Random draws.
            seed: Of the draws; global random streams are not touched.
        """
        if not self.n:
            return math.nan
        counts, share = self._filled()
        confidence = (self.confidence / self.counts).numpy()[self.counts.numpy() > 0].clip(0, 1)
        drawn = np.random.default_rng(seed).binomial(counts, confidence, size=(draws, len(counts)))
        return float((np.abs(drawn / counts - confidence) @ share).mean())

    def measures(self) -> dict[str, float]:
        """What a log shows: ``ece``, ``ece_low``, ``ece_high`` (95 %), ``ece_floor``, ``nll`` and ``brier``."""
        low, high = self.interval()
        return {
            "ece": self.ece,
            "ece_low": low,
            "ece_high": high,
            "ece_floor": self.floor(),
            "nll": self.mean_nll,
            "brier": self.mean_brier,
        }

    def to_dict(self) -> dict[str, list[int] | list[float]]:
        """Plain lists for a checkpoint: ``counts``, and each bin's mean ``confidence`` and ``accuracy``, 0 if empty."""
        counts = self.counts.clamp_min(1)
        return {
            "counts": self.counts.tolist(),
            "confidence": (self.confidence / counts).tolist(),
            "accuracy": (self.correct.double() / counts).tolist(),
        }

    def _mean(self, total: float) -> float:
        return total / self.n if self.n else math.nan

    def _filled(self) -> tuple[np.ndarray, np.ndarray]:
        """Counts of the bins that hold anything, and their shares."""
        counts = self.counts.numpy()[self.counts.numpy() > 0]
        return counts, counts / counts.sum()


def _per_row(log_p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Confidence, whether it is right, negative log-likelihood and Brier score of each row, ``(R,)``."""
    top, predicted = log_p.max(1)
    right = labels[:, None]
    log_right = log_p.gather(1, right)
    errors = log_p.exp().scatter_add_(1, right, log_p.new_full(right.shape, -1.0))
    return top.exp(), predicted == labels, -log_right.squeeze(1), errors.square_().sum(1)
