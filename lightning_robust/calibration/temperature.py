"""The temperature that makes probabilities honest: one number, found by Newton's method on its inverse."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TemperatureFit", "fit_temperature"]

MAX_PASSES = 64
TOLERANCE = 1e-6  # of a step, relative; Newton squares it, so the result is good to float32's round-off
CHUNK = 2**21  # numbers worked on at once: they stay in the cache, and a large set of logits needs no second copy


@dataclass(frozen=True)
class TemperatureFit:
    """What a fit found.

    Attributes:
        temperature: T of ``softmax(z / T)``; above 1 the model was over-confident.
        at_bound: Whether the best temperature lies at or beyond a bound. Then there is none to speak of: the model made
            no error on these data (lower bound), or its logits say nothing about the labels (upper bound).
        nll: Mean negative log-likelihood at T = 1, in nats.
        nll_scaled: The same at ``temperature``; never above ``nll``.
        samples: Rows that counted.
        passes: Passes over the logits.
    """

    temperature: float
    at_bound: bool
    nll: float
    nll_scaled: float
    samples: int
    passes: int


def fit_temperature(
    logits: Tensor,
    targets: Tensor,
    *,
    bounds: tuple[float, float] = (1 / 64, 64.0),
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> TemperatureFit:
    r"""The temperature with the smallest negative log-likelihood.

    With :math:`\beta = 1/T` the loss is convex, and both derivatives are means over rows that need no autograd:

    .. math:: L(\beta) = \overline{\log \textstyle\sum_k e^{\beta z_k} - \beta z_y}, \quad
              L'(\beta) = \overline{\mathbb{E}_p z - z_y}, \quad L''(\beta) = \overline{\mathrm{Var}_p z}

    Newton steps that leave the bracket are replaced by bisection, so that every start converges. The order of classes
    by probability does not change, and accuracy does not either. Fit on data that were not trained on, in eval mode.

    Args:
        logits: Logits or log-probabilities, ``(R, K)``, of any float type and on any device. ``-inf`` switches a class
            off. A process without rows gives ``(0, K)``.
        targets: Right classes ``(R,)``, integers in ``[0, K)``.
        bounds: Lowest and highest temperature, with 1 between them.
        reduce: Sums a small double tensor on the CPU over processes; every process calls it equally often and gets the
            same temperature. ``None`` for one process.

    Returns:
        The fit. Rows whose loss is not finite (NaN, infinite) are left out, with a warning that counts them.

    Raises:
        ValueError: If shapes, bounds or labels are wrong, or if no row is left.

    Example:
        >>> z, y = torch.tensor([[3.0, 0.0]]).expand(4, 2), torch.tensor([0, 0, 0, 1])  # 95 % sure, 75 % right
        >>> fit = fit_temperature(z, y)
        >>> round(fit.temperature, 4), round(3 / math.log(3), 4)
        (2.7307, 2.7307)

    References:
        Guo et al., `On Calibration of Modern Neural Networks <https://arxiv.org/abs/1706.04599>`_, 2017, section 4.2.
    """
    _check(logits, targets, bounds)
    objective = _Objective(logits.detach(), targets, reduce)
    coldest, hottest = 1 / bounds[0], 1 / bounds[1]
    plain = objective(1.0)
    # Where all is right and certain no derivative is left, but colder is right.
    colder = plain.slope < 0 or plain.nll == 0
    end = coldest if colder else hottest
    last = objective(end)
    at_bound = last.slope <= 0 if colder else last.slope >= 0
    if not at_bound:
        last = _root(objective, plain, end)
    if last.nll > plain.nll:  # round-off: the loss is flat around its minimum
        last, at_bound = plain, False
    return TemperatureFit(1 / last.beta, at_bound, plain.nll, last.nll, objective.samples, objective.passes)


@dataclass(frozen=True)
class _Point:
    """The mean loss and its derivatives at one beta."""

    beta: float
    nll: float
    slope: float
    curvature: float


class _Objective:
    """The loss as a function of beta, over the rows of all processes."""

    def __init__(self, logits: Tensor, targets: Tensor, reduce: Callable[[Tensor], Tensor] | None) -> None:
        self._logits, self._targets, self._reduce = logits, targets, reduce
        self.samples = self.passes = 0

    def __call__(self, beta: float) -> _Point:
        sums = torch.tensor([len(self._logits), 0, 0, 0, 0], dtype=torch.float64)
        for z, y in self._chunks():
            rows = _per_row(z, y, beta)
            rows = rows[:, rows.isfinite().all(0)]
            sums[1] += rows.shape[1]
            sums[2:] += rows.sum(1)
        given, kept, *totals = (sums if self._reduce is None else self._reduce(sums)).tolist()
        if not kept:
            raise ValueError(f"expected rows with a finite loss to fit a temperature, got {given:.0f} rows, none such.")
        if not self.passes and given > kept:
            warnings.warn(f"{given - kept:.0f} of {given:.0f} rows have no finite loss; left out.", stacklevel=3)
        self.passes += 1
        self.samples = int(kept)
        return _Point(beta, *(total / kept for total in totals))

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        size = max(1, CHUNK // max(1, self._logits.shape[1]))
        for start in range(0, len(self._logits), size):
            yield self._logits[start : start + size], self._targets[start : start + size, None].long()


def _per_row(z: Tensor, y: Tensor, beta: float) -> Tensor:
    """Loss, slope and curvature of each row, ``(3, rows)`` doubles on the CPU."""
    z = z if z.dtype == torch.float64 else z.float()
    u = z - z.amax(1, keepdim=True)
    u_right = u.gather(1, y)[:, 0]
    u.clamp_(min=torch.finfo(u.dtype).min)  # 0 times -inf is no number
    weights = (u * beta).exp_()
    total = weights.sum(1)
    first = weights.mul_(u).sum(1)
    second = weights.mul_(u).sum(1)
    # Doubles on the CPU: not every device has them.
    u_right, total, first, second = torch.stack([u_right, total, first, second]).cpu().double()
    mean = first / total
    return torch.stack([total.log() - beta * u_right, mean - u_right, second / total - mean.square()])


def _root(objective: _Objective, start: _Point, end: float) -> _Point:
    """Where the slope vanishes, between ``start`` and ``end``."""
    low, high = sorted((start.beta, end))
    point = start
    while objective.passes < MAX_PASSES:
        low, high = (point.beta, high) if point.slope < 0 else (low, point.beta)
        newton = point.beta - point.slope / point.curvature if point.curvature > 0 else math.inf
        beta = newton if low < newton < high else math.sqrt(low * high)
        small = abs(beta - point.beta) <= TOLERANCE * beta
        point = objective(beta)
        if small:
            break
    return point


def _check(logits: Tensor, targets: Tensor, bounds: tuple[float, float]) -> None:
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"expected logits (R, K) and targets (R,), got {tuple(logits.shape)} and {tuple(targets.shape)}; "
            "LossCall.rows() makes them from other shapes."
        )
    if not 0 < bounds[0] <= 1 <= bounds[1] < math.inf:
        raise ValueError(f"expected bounds of a temperature, 0 < lowest <= 1 <= highest, got {bounds}.")
    lost = (targets < 0) | (targets >= logits.shape[1])
    if bool(lost.any()):
        raise ValueError(
            f"expected targets in [0, {logits.shape[1]}), got {sorted(set(targets[lost].tolist()))[:10]}; leave "
            "rows without a label out, and check the number of classes."
        )
