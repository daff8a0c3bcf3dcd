"""Isotonic calibration: for each class the best monotone curve from its log-odds to how often it is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_robust.calibration.temperature import usable_rows

__all__ = ["IsotonicCalibration", "fit_isotonic"]

CELLS = 1024
WIDEST = 24.0  # log-odds beyond which cells do not tell probabilities apart: 4e-11


@dataclass(frozen=True)
class IsotonicCalibration:
    """One monotone curve for each class, then normalised to sum to 1.

    Between its knots a curve is linear in the log-odds, beyond them it is constant. The likeliest class may become
    another one, and classes on one flat piece become equally likely.

    Attributes:
        at: Log-odds ``log(p / (1 - p))`` of each class's knots, increasing.
        values: Probabilities at the knots, non-decreasing, for each class within ``[1/(n+2), (n+1)/(n+2)]``.
        samples: Rows n that were fitted on.

    Example:
        >>> curve = IsotonicCalibration(at=((-1.0, 1.0),) * 2, values=((0.4, 0.6),) * 2, samples=10)
        >>> curve(torch.tensor([[9.0, 0.0], [0.0, 0.5]])).exp()
        tensor([[0.6000, 0.4000],
                [0.4500, 0.5500]])
    """

    name: ClassVar[str] = "isotonic"
    keeps_order: ClassVar[bool] = False
    at: tuple[tuple[float, ...], ...]
    values: tuple[tuple[float, ...], ...]
    samples: int

    @property
    def at_bound(self) -> bool:
        """Whether no curve says anything: each is flat, or a step from the lowest to the highest probability."""
        ends = {1 / (self.samples + 2), (self.samples + 1) / (self.samples + 2)}
        return all(len(set(curve)) == 1 or set(curve) <= ends for curve in self.values)

    def __call__(self, logits: Tensor) -> Tensor:
        """Recalibrated log-probabilities, ``(R, K)``, at least float32; ``-inf`` stays.

        Raises:
            ValueError: If the number of classes is another one.
        """
        if logits.ndim != 2 or logits.shape[1] != len(self.at):
            raise ValueError(f"expected logits (R, {len(self.at)}), as fitted, got {tuple(logits.shape)}.")
        z = logits if logits.dtype == torch.float64 else logits.float()
        log_p = z.log_softmax(1)
        columns = _log_odds(log_p).t().contiguous()
        curves = zip(columns, self.at, self.values, strict=True)
        p = torch.stack([_interpolated(x, at, values) for x, at, values in curves], dim=1)
        # No class has a calibrated probability of 0, so a row never sums to 0.
        log_q = p.log().masked_fill_(log_p == -torch.inf, -torch.inf)
        return log_q - log_q.logsumexp(1, keepdim=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint: the knots only."""
        at, values = ([list(curve) for curve in curves] for curves in (self.at, self.values))
        return {"name": self.name, "at": at, "values": values, "samples": self.samples}

    @classmethod
    def load(cls, plain: Mapping[str, Any]) -> IsotonicCalibration:
        """What :meth:`to_dict` wrote."""
        at, values = (tuple(tuple(curve) for curve in plain[key]) for key in ("at", "values"))
        return cls(at, values, plain["samples"])


def fit_isotonic(
    logits: Tensor, labels: Tensor, *, reduce: Callable[[Tensor], Tensor] | None = None
) -> IsotonicCalibration:
    """The monotone curves with the smallest squared error, one class against the rest.

    Rows are counted on a grid of 1024 cells of each class's log-odds from -24 to 24 (a cell moves a probability by at
    most 0.012), so that a fit of fixed size adds up over processes; a knot lies at the mean log-odds of its cell.
    Probabilities are kept within ``[1/(n+2), (n+1)/(n+2)]`` for n rows, Laplace's estimates for "never" and "always":
    with 0 and 1 one unlucky row would make the likelihood infinite. For K classes this takes about K times as many
    rows as a temperature does; report numbers of other data than those that were fitted on.

    Args:
        logits: Logits or log-probabilities, ``(R, K)`` with K >= 2, of any float type. ``-inf`` switches a class off. A
            process without rows gives ``(0, K)``.
        labels: Right classes ``(R,)``, integers in ``[0, K)``.
        reduce: Sums a double tensor on the CPU, ``(3, K, 1024)``, over processes. ``None`` for one process.

    Returns:
        The fit. Rows whose loss is not finite are left out, with a warning that counts them.

    Raises:
        ModuleNotFoundError: Without scikit-learn.
        ValueError: If shapes or labels are wrong, or if no row is left.

    Example:
        >>> z = torch.tensor([[0.0, -1.0], [0.0, 1.0]]).repeat_interleave(10, 0)
        >>> y = torch.tensor([1] * 2 + [0] * 8 + [1] * 9 + [0])  # yes is right in 2 of 10, then in 9 of 10
        >>> fit_isotonic(z, y)(z[[0, 10]])[:, 1].exp()
        tensor([0.2000, 0.9000])

    References:
        Zadrozny and Elkan, `Transforming Classifier Scores into Accurate Multiclass Probability Estimates
        <https://doi.org/10.1145/775047.775151>`_, 2002.
    """
    isotonic_regression = _pava()  # at once: what is missing shows before anything is computed
    log_p, y, _, n = usable_rows(logits, labels, reduce)
    grid = _grid(log_p, y)
    grid = grid if reduce is None else reduce(grid)
    curves = [_curve(sums, n, isotonic_regression) for sums in grid.unbind(1)]
    return IsotonicCalibration(tuple(at for at, _ in curves), tuple(values for _, values in curves), n)


def _pava() -> Callable[..., Any]:
    try:
        from sklearn.isotonic import isotonic_regression  # the only fit that needs it
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("isotonic calibration needs scikit-learn: pip install scikit-learn") from error
    return isotonic_regression  # type: ignore[no-any-return]  # scikit-learn has no types


def _log_odds(log_p: Tensor) -> Tensor:
    """``log(p / (1 - p))`` within the grid; of the likeliest class by the others' sum, as ``1 - p`` would lose it."""
    if not len(log_p):
        return log_p
    top = log_p.argmax(1, keepdim=True)
    rest = log_p.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True)
    small = log_p.clamp(max=math.log(0.5))
    odds = (small - (-small.exp()).log1p()).scatter(1, top, log_p.gather(1, top) - rest)
    return odds.clamp(-WIDEST, WIDEST)


def _grid(log_p: Tensor, labels: Tensor) -> Tensor:
    """Rows, rows of this class and sum of log-odds in each cell, ``(3, K, cells)`` doubles."""
    classes = log_p.shape[1]
    counts, right = (torch.zeros(classes, CELLS, dtype=torch.int64) for _ in range(2))
    total = torch.zeros(classes, CELLS, dtype=torch.float64)
    odds = _log_odds(log_p)
    cells = ((odds + WIDEST) * (CELLS / (2 * WIDEST))).long().clamp_(max=CELLS - 1)
    for k in range(classes):
        on = log_p[:, k] != -torch.inf
        cell, x = cells[on, k], odds[on, k].double()
        counts[k] = torch.bincount(cell, minlength=CELLS)
        right[k] = torch.bincount(cell[labels[on] == k], minlength=CELLS)
        total[k] = torch.bincount(cell, x, CELLS)
    return torch.stack([counts.double(), right.double(), total])


def _curve(
    sums: Tensor, n: int, isotonic_regression: Callable[..., Any]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Where a curve bends and its values there."""
    counts, right, total = sums[:, sums[0] > 0]
    if not len(counts):  # a class that is always switched off
        return (0.0,), (1 / (n + 2),)
    low, high = 1 / (n + 2), (n + 1) / (n + 2)
    share, weight = (right / counts).numpy(), counts.numpy()
    values: Sequence[float] = isotonic_regression(share, sample_weight=weight, y_min=low, y_max=high).tolist()
    at: Sequence[float] = (total / counts).tolist()
    last = len(values) - 1
    bends = [i for i in range(len(values)) if i in (0, last) or not values[i - 1] == values[i] == values[i + 1]]
    return tuple(at[i] for i in bends), tuple(values[i] for i in bends)


def _interpolated(x: Tensor, at: Sequence[float], values: Sequence[float]) -> Tensor:
    if len(at) == 1:
        return torch.where(x.isnan(), x, values[0])
    knots, heights = (torch.tensor(row, dtype=x.dtype, device=x.device) for row in (at, values))
    left = (torch.searchsorted(knots, x, right=True) - 1).clamp(0, len(at) - 2)
    share = ((x - knots[left]) / (knots[left + 1] - knots[left])).clamp(0, 1)
    return heights[left].lerp(heights[left + 1], share)
