"""How often predictions are right, by how sure they are: sums of fixed size, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["Norm", "Reliability"]

Norm = Literal["l1", "rms", "max", "debiased"]
"""How the gaps of the bins become one number: see :meth:`Reliability.error`."""

# A confidence of exactly m/M comes out of log_softmax and exp a few units in the last place off, upwards or downwards.
# It goes to the bin below its edge all the same, on every device.
ROUNDING = 1e-6
LOG2_E = math.log2(math.e)


@dataclass(frozen=True, eq=False)
class Reliability:
    """Sums over single predictions, by bins of the confidence in the likeliest class.

    M bins of equal width, ``((m-1)/M, m/M]``: a confidence on an edge belongs to the bin below it, 0 to the first, 1 to
    the last. Sums add up: the order of samples, the batches and the number of processes mean nothing, but for the last
    place of the Brier score of a row. Counts are integers and the other sums are doubles, because sums in float32 lose
    a third of the error at ten million predictions. All means are NaN where nothing was counted.

    Attributes:
        counts: Predictions in each bin, ``(M,)`` int64.
        confidence: Sums of the confidence, ``(M,)`` float64.
        correct: How many were right, ``(M,)`` int64.
        nll: Sum of ``-log p`` of the right class, in nats.
        brier: Sum of the squared errors of all class probabilities, 0..2 each (twice scikit-learn's for two classes).
        brier_top: Sum of ``(confidence - correct)**2``, 0..1 each: the Brier score of being right.
        invalid: Rows with NaN, and rows that are no distribution; they are counted here only. A right class of
            probability 0 is none of these: it is as wrong as can be, and makes the loss infinite.

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
    brier_top: float
    invalid: int

    @classmethod
    def zero(cls, bins: int = 15) -> Reliability:
        """Nothing counted yet.

        Raises:
            ValueError: If there is not at least one bin.
        """
        if bins < 1:
            raise ValueError(f"expected at least one bin, got bins={bins}; 15 is usual.")
        return cls.load(torch.zeros(3 * bins + 4, dtype=torch.float64))

    @classmethod
    def of(cls, log_probabilities: Tensor, labels: Tensor, bins: int = 15, *, overwrite: bool = False) -> Reliability:
        """Count predictions.

        Args:
            log_probabilities: ``(R, K)``, e.g. of ``log_softmax``; half precision is raised to float32. ``-inf`` stands
                for a probability of 0.
            labels: Right classes ``(R,)``, integers in ``[0, K)``.
            bins: How many bins.
            overwrite: Whether ``log_probabilities`` may be used as scratch memory: who needs them no more saves a copy.

        Raises:
            ValueError: If shapes do not fit, a label names no class, or the numbers are no log-probabilities.
        """
        log_p = checked_rows(log_probabilities, labels)
        if not len(labels):
            return cls.zero(bins)
        # Numbers per row go to the CPU: not every device has doubles, and weighted counts on CUDA vary from run to run.
        confidence, correct, nll, brier = (v.cpu() for v in _per_row(log_p, labels.long(), overwrite))
        check_confidence(confidence)
        brier = torch.where(confidence > 0, brier, torch.nan)  # all classes ruled out: that is no distribution
        return cls._counted(confidence, correct, nll, brier, bins)

    @classmethod
    def of_events(
        cls, probability: Tensor, happened: Tensor, bins: int = 15, *, nll: Tensor | None = None
    ) -> Reliability:
        """Count forecasts of yes/no events: the probability of yes against how often it was yes.

        For the positive class of a yes/no head, or single labels of a multi-label one. What is called confidence is
        then the probability of yes, from 0 to 1, and what is called correct or accuracy is how often yes came true: a
        model that says 0.1 and is right about it has no gap.

        Args:
            probability: Of yes, ``(R,)``, in [0, 1]; half precision is raised to float32.
            happened: Whether it was yes, ``(R,)``, bool or 0/1.
            bins: How many bins.
            nll: ``-log`` of the probability of what happened, ``(R,)``, from whoever has it in log space: a probability
                that rounds to 0 or 1 has an infinite one otherwise where it is wrong.

        Returns:
            The sums. The Brier score is ``2 * (p - y)**2``, the sum over yes and no, to stay on the scale from 0 to 2.

        Raises:
            ValueError: If shapes do not fit, or numbers are no probabilities.

        Example:
            >>> rain = Reliability.of_events(torch.tensor([0.1, 0.1, 0.7, 0.7]), torch.tensor([0, 0, 1, 1]))
            >>> round(rain.ece, 3), round(rain.mean_brier, 3)
            (0.2, 0.1)
        """
        if probability.ndim != 1 or happened.shape != probability.shape:
            raise ValueError(
                "expected probabilities (R,) and events (R,), got "
                f"{tuple(probability.shape)} and {tuple(happened.shape)}; flatten several labels or pixels."
            )
        p = probability.detach().cpu()
        p = p if p.dtype == torch.float64 else p.float()
        yes = happened.cpu() > 0.5
        strange = happened.cpu() != yes
        if bool(strange.any()):
            raise ValueError(
                f"expected events of 0 and 1, got {sorted(set(happened.cpu()[strange].tolist()))[:10]}; leave rows "
                "without a label out."
            )
        outside = (p < 0) | (p > 1)
        if bool(outside.any()):
            raise ValueError(
                f"expected probabilities in [0, 1], got {float(p[outside][0]):.3g}; for logits take a sigmoid first."
            )
        loss = -torch.where(yes, p, 1 - p).log() if nll is None else nll.detach().cpu()
        return cls._counted(p, yes, loss, 2 * (p - yes.to(p.dtype)).square(), bins)

    @classmethod
    def _counted(cls, confidence: Tensor, correct: Tensor, nll: Tensor, brier: Tensor, bins: int) -> Reliability:
        given = len(confidence)
        if not math.isfinite(float((confidence + nll + brier).sum())):
            # A right class that was ruled out is as wrong as can be: its loss is infinite, the rest is not.
            valid = (confidence + brier).isfinite() & ~nll.isnan()
            confidence, correct, nll, brier = (column[valid] for column in (confidence, correct, nll, brier))
        where = torch.bucketize(confidence, _edges(bins, confidence.dtype))
        wrong, right = torch.bincount(where + bins * correct, minlength=2 * bins).view(2, bins)
        exact = confidence.double()
        return cls(
            counts=wrong + right,
            confidence=torch.bincount(where, exact, bins),
            correct=right,
            nll=float(nll.sum(dtype=torch.float64)),
            brier=float(brier.sum(dtype=torch.float64)),
            brier_top=float((exact - correct.double()).square().sum()),
            invalid=given - len(confidence),
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
            self.brier_top + other.brier_top,
            self.invalid + other.invalid,
        )

    def state(self) -> Tensor:
        """Everything, ``(3 M + 4,)`` doubles to be summed over processes; counts stay exact up to 2**53."""
        rest = torch.tensor([self.nll, self.brier, self.brier_top, self.invalid], dtype=torch.float64)
        return torch.cat([self.counts, self.confidence, self.correct, rest])

    @classmethod
    def load(cls, state: Tensor) -> Reliability:
        """The sums that :meth:`state` wrote, or several of them added.

        Raises:
            ValueError: If the length is not that of a state.
        """
        bins, rest = divmod(len(state) - 4, 3)
        if state.ndim != 1 or bins < 1 or rest:
            raise ValueError(f"expected a state of 3 M + 4 numbers, got {tuple(state.shape)}.")
        state = state.detach().cpu().double()
        counts, confidence, correct = state[:-4].view(3, bins).clone()
        nll, brier, brier_top, invalid = state[-4:].tolist()
        return cls(counts.long(), confidence, correct.long(), nll, brier, brier_top, int(invalid))

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

    @property
    def rms(self) -> float:
        """Root of the mean squared gap, in [0, 1]; never below :attr:`ece`, and further above 0 for a perfect model."""
        return math.sqrt(self._mean(float((self.counts * self._gaps().square()).sum())))

    @property
    def maximum(self) -> float:
        """The largest gap of a bin that holds anything, in [0, 1]; one prediction alone in its bin may decide it."""
        return float(self._gaps().abs().max()) if self.n else math.nan

    @property
    def debiased(self) -> float:
        r"""The mean *squared* gap without what chance adds to it: about 0 for a perfect model, and then often below 0.

        .. math:: \sum_m \tfrac{n_m}{N} \left[ (\mathrm{acc}_m - \mathrm{conf}_m)^2
                  - \frac{\mathrm{acc}_m (1 - \mathrm{acc}_m)}{n_m - 1} \right]

        A bin of one prediction says nothing about its own noise: it adds 0, and counts in N. No root is taken, because
        the mean of the root would be off again.

        References:
            Kumar, Liang and Ma, `Verified Uncertainty Calibration <https://arxiv.org/abs/1909.10155>`_, 2019,
            definition 4.1.
        """
        counts = self.counts.double()
        accuracy = self.correct / counts.clamp_min(1)
        noise = accuracy * (1 - accuracy) / (counts - 1).clamp_min(1)
        return self._mean(float((counts * (self._gaps().square() - noise))[self.counts > 1].sum()))

    def error(self, norm: Norm = "l1") -> float:
        """The calibration error by name: ``l1`` is :attr:`ece`, the others :attr:`rms`, :attr:`maximum` (``max``) and
        :attr:`debiased` (of squares).

        Raises:
            ValueError: If there is no such norm.
        """
        of: dict[str, str] = {"l1": "ece", "rms": "rms", "max": "maximum", "debiased": "debiased"}
        if norm not in of:
            raise ValueError(f"expected norm= to be one of {', '.join(of)}, got {norm!r}.")
        return float(getattr(self, of[norm]))

    def murphy(self) -> dict[str, float]:
        r"""What the Brier score of being right is made of.

        ``brier_top = reliability - resolution + uncertainty + within``, exactly. Over bins m of confidence,

        ===============  ===========================================================================================
        ``brier_top``    mean of ``(confidence - correct)**2``, in [0, 1]
        ``reliability``  :math:`\sum_m w_m (\mathrm{conf}_m - \mathrm{acc}_m)^2`; 0 is perfectly calibrated
        ``resolution``   :math:`\sum_m w_m (\mathrm{acc}_m - \mathrm{acc})^2`; how far confidence tells right from wrong
        ``uncertainty``  ``acc * (1 - acc)``: how hard the task is for this model
        ``within``       what differences inside bins add; near 0 where bins are narrow, and of either sign
        ===============  ===========================================================================================

        Example:
            >>> p = torch.tensor([[0.8, 0.2], [0.9, 0.1], [0.3, 0.7], [0.4, 0.6]])
            >>> murphy = Reliability.of(p.log(), torch.tensor([0, 0, 1, 0])).murphy()
            >>> {name: round(value, 4) for name, value in murphy.items()}
            {'brier_top': 0.125, 'reliability': 0.125, 'resolution': 0.1875, 'uncertainty': 0.1875, 'within': 0.0}

        References:
            Murphy, `A New Vector Partition of the Probability Score
            <https://doi.org/10.1175/1520-0450(1973)012%3C0595:ANVPOT%3E2.0.CO;2>`_, 1973; the term ``within`` is that
            of Stephenson, Coelho and Jolliffe, 2008.
        """
        accuracy = self.correct.double() / self.counts.clamp_min(1)
        brier = self._mean(self.brier_top)
        reliability = self._mean(float((self.counts * self._gaps().square()).sum()))
        resolution = self._mean(float((self.counts * (accuracy - self.accuracy).square()).sum()))
        uncertainty = self.accuracy * (1 - self.accuracy)
        return {
            "brier_top": brier,
            "reliability": reliability,
            "resolution": resolution,
            "uncertainty": uncertainty,
            "within": brier - reliability + resolution - uncertainty,
        }

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
        """What a log shows.

        ``ece``, ``ece_low``, ``ece_high`` (95 %), ``ece_floor``, ``nll``, ``brier``; ``ece_rms`` (:attr:`rms`),
        ``ece_max`` (:attr:`maximum`), ``ece_debiased`` (:attr:`debiased`, of squares); and of :meth:`murphy`
        ``brier_reliability``, ``brier_resolution`` and ``brier_uncertainty``.
        """
        return dict(self._measures)

    @cached_property
    def _measures(self) -> dict[str, float]:
        # Interval and floor are drawn; a diagram and a log show the same ones.
        low, high = self.interval()
        murphy = self.murphy()
        return {
            "ece": self.ece,
            "ece_low": low,
            "ece_high": high,
            "ece_floor": self.floor(),
            "nll": self.mean_nll,
            "brier": self.mean_brier,
            "ece_rms": self.rms,
            "ece_max": self.maximum,
            "ece_debiased": self.debiased,
            "brier_reliability": murphy["reliability"],
            "brier_resolution": murphy["resolution"],
            "brier_uncertainty": murphy["uncertainty"],
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

    def _gaps(self) -> Tensor:
        """Mean confidence minus accuracy of each bin, ``(M,)``, 0 where there is nothing."""
        return (self.confidence - self.correct) / self.counts.clamp_min(1)

    def _filled(self) -> tuple[np.ndarray, np.ndarray]:
        """Counts of the bins that hold anything, and their shares."""
        counts = self.counts.numpy()[self.counts.numpy() > 0]
        return counts, counts / counts.sum()


def checked_rows(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities ``(R, K)`` in at least float32 and without a graph, where each row has a label in ``[0, K)``.

    Raises:
        ValueError: If shapes do not fit, or a label names no class.
    """
    if log_probabilities.ndim != 2 or labels.shape != log_probabilities.shape[:1]:
        raise ValueError(
            "expected log-probabilities (R, K) and labels (R,), got "
            f"{tuple(log_probabilities.shape)} and {tuple(labels.shape)}; LossCall.rows() makes them."
        )
    log_p = log_probabilities.detach()
    classes = log_p.shape[1]
    low, high = (int(end) for end in labels.aminmax()) if len(labels) else (0, -1)
    if low < 0 or high >= classes:
        lost = labels[(labels < 0) | (labels >= classes)]
        raise ValueError(
            f"expected labels in [0, {classes}), got {sorted(set(lost.tolist()))[:10]}; leave rows "
            "without a label out, and check the number of classes."
        )
    return log_p if log_p.dtype == torch.float64 else log_p.float()


def check_confidence(confidence: Tensor) -> None:
    """Whether confidences that were computed from log-probabilities are at most 1; infinite ones are passed over.

    Raises:
        ValueError: If one is not.
    """
    if not confidence.numel() or float(confidence.max()) <= 1.01:
        return
    finite = confidence[confidence.isfinite()]
    if len(finite) and float(finite.max()) > 1.01:
        raise ValueError(
            f"expected log-probabilities, at most 0, got {math.log(float(finite.max())):.3g}; "
            "for logits take log_softmax first."
        )


@lru_cache(maxsize=16)
def _edges(bins: int, dtype: torch.dtype) -> Tensor:
    """Upper edges of all bins but the last."""
    if bins < 1:
        raise ValueError(f"expected at least one bin, got bins={bins}; 15 is usual.")
    return (torch.arange(1, bins, dtype=torch.float64, device="cpu") / bins + ROUNDING).to(dtype)


def _per_row(log_p: Tensor, labels: Tensor, overwrite: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Confidence, whether it is right, negative log-likelihood and Brier score of each row, ``(R,)``."""
    at = labels[:, None]
    log_right = log_p.gather(1, at).squeeze(1)
    others = log_p.scatter_(1, at, -math.inf) if overwrite else log_p.scatter(1, at, -math.inf)
    best_other = others.amax(1)
    correct = log_right > best_other
    tied = log_right == best_other
    if bool(tied.any()):  # the first of equals is the prediction, as argmax has it
        correct[tied] = others[tied].argmax(1) > labels[tied]
    # On CPUs torch's exp2 takes a quarter of the time of its exp, and this is the longest part of all.
    squares = others.mul_(2 * LOG2_E).exp2_().sum(1)
    confidence = torch.maximum(log_right, best_other).exp()
    return confidence, correct, -log_right, squares + log_right.expm1().square()
