"""Prediction sets: all classes that may well be right, so that the right one is among them as often as promised."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_robust.calibration.temperature import check_rows, usable_rows
from lightning_robust.randomness import priorities

__all__ = ["PredictionSets", "SetSums", "fit_prediction_sets"]

METHODS = ("lac", "aps")
CELLS = 2**16


@dataclass(frozen=True)
class PredictionSets:
    r"""Sets of classes that hold the right one with probability ``1 - alpha`` (split conformal prediction).

    A class belongs to the set of a row if its score is at most the threshold:

    ===========  =======================================================================================================
    ``"lac"``    :math:`-\log p_k`; the smallest sets on average, but hard rows may get an empty one
    ``"aps"``    mass of all likelier classes plus ``u p_k``, with u uniform in [0, 1); sets grow where rows are hard,
                 and sure rows may get an empty one
    ===========  =======================================================================================================

    The promise is about rows drawn as those of the fit were, and on average over such fits and rows: not for each class
    by itself, and not under shift.

    Attributes:
        method: ``"lac"`` or ``"aps"``.
        alpha: Share of rows whose set may miss the right class, in (0, 1).
        threshold: Highest score within a set; infinite where the fit had too few rows (see :attr:`everything`).
        samples: Rows that were fitted on.
        randomized: Whether u is random; else it is 1: no chance in a set, the same coverage, larger sets.
        seed: Of u.

    Example:
        >>> sets = PredictionSets("lac", alpha=0.1, threshold=-math.log(0.3), samples=99)
        >>> sets(torch.tensor([[0.5, 0.4, 0.1], [0.9, 0.05, 0.05]]).log())
        tensor([[ True,  True, False],
                [ True, False, False]])
    """

    method: str
    alpha: float
    threshold: float
    samples: int
    randomized: bool = True
    seed: int = 0

    @property
    def everything(self) -> bool:
        """Whether there were too few rows for a promise (n < 1/alpha - 1), so that every set holds all classes."""
        return math.isinf(self.threshold)

    def __call__(self, log_probabilities: Tensor, sample: Tensor | None = None) -> Tensor:
        """Which classes are in the set of each row, ``(R, K)`` bool, on the device of the input.

        Args:
            log_probabilities: ``(R, K)``, recalibrated as those of the fit were; logits will do for temperature 1.
            sample: Number of each row, ``(R,)`` int64, from which ``"aps"`` draws u; by default u is drawn from what
                the row holds, so that sets do not depend on what else is in the batch. Other numbers than the fit drew
                are drawn for the same ``sample``. Rows with NaN get all classes.
        """
        z = log_probabilities.detach()
        log_p = (z if z.dtype == torch.float64 else z.float()).log_softmax(1)
        u = _draws(log_p, sample, self.seed + 1) if self.method == "aps" and self.randomized else None
        # Not `<=`: comparisons with NaN are false, and a row of which nothing is known may be anything.
        return ~(_scores(log_p.cpu(), self.method, u) > self.threshold).to(z.device)

    def measured(self, log_probabilities: Tensor, labels: Tensor, sample: Tensor | None = None) -> SetSums:
        """Count how often the sets hold the right class, and how large they are.

        Args:
            log_probabilities: ``(R, K)`` of rows that were not fitted on.
            labels: Right classes ``(R,)``.
            sample: See :meth:`__call__`.

        Raises:
            ValueError: If shapes or labels are wrong.
        """
        check_rows(log_probabilities, labels)
        known = ~log_probabilities.detach().isnan().any(1).cpu()
        sets, y = self(log_probabilities, sample).cpu()[known], labels.detach().cpu().long()[known]
        classes, sizes = sets.shape[1], sets.sum(1)
        covered = sets.gather(1, y[:, None])[:, 0]
        return SetSums(
            counts=torch.bincount(y, minlength=classes),
            covered=torch.bincount(y[covered], minlength=classes),
            size=int(sizes.sum()),
            empty=int((sizes == 0).sum()),
            invalid=int((~known).sum()),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint or a JSON file; an infinite threshold is None."""
        return {
            "method": self.method,
            "alpha": self.alpha,
            "threshold": None if self.everything else self.threshold,
            "samples": self.samples,
            "randomized": self.randomized,
            "seed": self.seed,
        }

    @classmethod
    def load(cls, plain: Mapping[str, Any]) -> PredictionSets:
        """What :meth:`to_dict` wrote."""
        threshold = math.inf if plain["threshold"] is None else plain["threshold"]
        return cls(**{**plain, "threshold": threshold})


@dataclass(frozen=True, eq=False)
class SetSums:
    """How sets of predictions did, by the true class; sums add up over batches and processes.

    Attributes:
        counts: Rows of each class, ``(K,)`` int64.
        covered: Of those the ones whose set holds the class, ``(K,)`` int64.
        size: Sum of the sizes of all sets.
        empty: Sets without any class.
        invalid: Rows with NaN; they are counted here only.

    Example:
        >>> sums = SetSums(torch.tensor([6, 4]), torch.tensor([6, 2]), size=12, empty=1, invalid=0)
        >>> sums.coverage, sums.mean_size, sums.empty_share, sums.worst_class
        (0.8, 1.2, 0.1, (1, 0.5))
    """

    counts: Tensor
    covered: Tensor
    size: int
    empty: int
    invalid: int

    def __add__(self, other: SetSums) -> SetSums:
        return SetSums.load(self.state() + other.state())

    def state(self) -> Tensor:
        """Everything, ``(2 K + 3,)`` doubles to be summed over processes; counts stay exact up to 2**53."""
        rest = torch.tensor([self.size, self.empty, self.invalid], dtype=torch.float64)
        return torch.cat([self.counts.double(), self.covered.double(), rest])

    @classmethod
    def load(cls, state: Tensor) -> SetSums:
        """The sums that :meth:`state` wrote, or several of them added.

        Raises:
            ValueError: If the length is not that of a state.
        """
        classes, rest = divmod(len(state) - 3, 2)
        if state.ndim != 1 or classes < 1 or rest:
            raise ValueError(f"expected a state of 2 K + 3 numbers, got {tuple(state.shape)}.")
        whole = state.detach().cpu().double().long()
        counts, covered = whole[:-3].view(2, classes).clone()
        size, empty, invalid = whole[-3:].tolist()
        return cls(counts, covered, size, empty, invalid)

    @property
    def n(self) -> int:
        """How many rows were counted, without the invalid ones."""
        return int(self.counts.sum())

    @property
    def coverage(self) -> float:
        """Share of sets that hold the right class, in [0, 1]; NaN where nothing was counted."""
        return self._mean(int(self.covered.sum()))

    @property
    def mean_size(self) -> float:
        """Mean number of classes in a set, in [0, K]."""
        return self._mean(self.size)

    @property
    def empty_share(self) -> float:
        """Share of sets without any class, in [0, 1]."""
        return self._mean(self.empty)

    @property
    def worst_class(self) -> tuple[int, float]:
        """The class that its sets miss most often, and their coverage; ``(-1, nan)`` where nothing was counted."""
        if not self.n:
            return -1, math.nan
        share = torch.where(self.counts > 0, self.covered / self.counts, math.inf)
        worst = int(share.argmin())
        return worst, float(self.covered[worst] / self.counts[worst].double())

    def measures(self) -> dict[str, float]:
        """Coverage, mean size, share of empty sets and the coverage of the worst class."""
        return {
            "coverage": self.coverage,
            "mean_size": self.mean_size,
            "empty_share": self.empty_share,
            "worst_class_coverage": self.worst_class[1],
        }

    def _mean(self, total: int) -> float:
        return total / self.n if self.n else math.nan


def fit_prediction_sets(
    log_probabilities: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.1,
    method: str = "lac",
    seed: int = 0,
    sample: Tensor | None = None,
    randomized: bool = True,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> PredictionSets:
    r"""Find the threshold below which the right class's score falls with probability ``1 - alpha``.

    It is the :math:`\lceil (n + 1) (1 - \alpha) \rceil`-th smallest score of the right classes. For new rows drawn
    alike and scores without ties the coverage is :math:`\lceil (n + 1) (1 - \alpha) \rceil / (n + 1)` on average,
    whatever the model; ties only raise it.

    Args:
        log_probabilities: ``(R, K)`` of rows that neither the model nor its recalibrator was fitted on.
        labels: Right classes ``(R,)``, integers in ``[0, K)``.
        alpha: Share of rows whose set may miss the right class.
        method: ``"lac"`` or ``"aps"``; see :class:`PredictionSets`.
        seed: Of the random numbers of ``"aps"``.
        sample: Number of each row over all processes, ``(R,)`` int64, from which they are drawn; by default 0, 1, 2,
            ...
        randomized: False for ``"aps"`` without random numbers.
        reduce: Sums a double tensor on the CPU over processes. Scores are then counted in 65,536 cells and the
            threshold is the upper edge of one, at most 0.00002 of mass too high (``"aps"``). ``None`` for one process,
            and the exact threshold.

    Returns:
        The sets. Rows whose loss is not finite are left out, with a warning that counts them.

    Raises:
        ValueError: If a setting, a shape or a label is wrong, or if no row is left.

    Example:
        >>> log_p = torch.tensor([[0.6, 0.4]]).log().expand(9, 2)
        >>> sets = fit_prediction_sets(log_p, torch.tensor([0] * 8 + [1]), alpha=0.2)  # the 8th smallest of 9 scores
        >>> round(math.exp(-sets.threshold), 3), sets.samples
        (0.6, 9)

    References:
        Sadinle, Lei and Wasserman, `Least Ambiguous Set-Valued Classifiers With Bounded Error Levels
        <https://arxiv.org/abs/1609.00451>`_, 2019 (LAC); Romano, Sesia and Candès, `Classification with Valid and
        Adaptive Coverage <https://arxiv.org/abs/2006.02544>`_, 2020 (APS).
    """
    if method not in METHODS:
        raise ValueError(f"expected a method out of {', '.join(METHODS)}; got {method!r}.")
    if not 0 < alpha < 1:
        raise ValueError(f"expected 0 < alpha < 1, the share of rows that may be missed, got alpha={alpha}.")
    if sample is not None and sample.shape != labels.shape:
        raise ValueError(f"expected sample= (R,) for {len(labels)} rows, got {tuple(sample.shape)}.")
    log_p, y, usable, n = usable_rows(log_probabilities, labels, reduce)
    u = None
    if method == "aps" and randomized:
        numbers = torch.arange(len(usable)) if sample is None else sample.cpu()
        u = _draws(log_p, numbers[usable], seed)
    scores = _scores(log_p, method, u).gather(1, y[:, None])[:, 0]
    # Whole numbers: (1 - 0.1) * 10 may be a hair above 9.
    rank = n + 1 - math.floor((n + 1) * alpha + 1e-9)
    counts = None if reduce is None else reduce(_counted(scores, method))
    if rank > n:
        threshold = math.inf
    elif counts is None:
        threshold = float(scores.kthvalue(rank).values)
    else:
        edge = (int((counts.cumsum(0) < rank).sum()) + 1) / CELLS
        threshold = edge if method == "aps" else math.inf if edge == 1 else edge / (1 - edge)
    return PredictionSets(method, alpha, threshold, n, randomized, seed)


def _draws(log_p: Tensor, sample: Tensor | None, seed: int) -> Tensor:
    if sample is None:
        # The bits of a row as one number: by its place in a batch, inputs that come one by one would all draw alike.
        bits = log_p.detach().cpu().float().view(torch.int32).long()
        weights = (priorities(torch.arange(bits.shape[1]), seed) * 2**40).long() * 2 + 1
        sample = (bits * weights).sum(1).abs()
    return priorities(sample, seed)


def _scores(log_p: Tensor, method: str, u: Tensor | None) -> Tensor:
    """The score of every class, ``(R, K)`` doubles; ``u`` ``(R,)`` stands for 1 if None."""
    if method == "lac":
        return -log_p.double()
    order = log_p.argsort(dim=1, descending=True, stable=True)
    p = log_p.double().exp().gather(1, order)
    mass = p.cumsum(1)
    mass = mass if u is None else mass - (1 - u[:, None]) * p
    # Round-off must not push the last class out of reach of a threshold of 1.
    return torch.empty_like(mass).scatter_(1, order, mass.clamp_(max=1))


def _counted(scores: Tensor, method: str) -> Tensor:
    """How many scores lie in each cell; ``s / (1 + s)`` brings those of "lac" into [0, 1)."""
    unit = scores if method == "aps" else scores / (1 + scores)
    return torch.bincount((unit * CELLS).long().clamp(0, CELLS - 1), minlength=CELLS).double()
