"""The temperature that makes probabilities honest: one number, found by Newton's method on its inverse."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["Temperature", "TemperatureFit", "fit_temperature"]

MAX_PASSES = 64
LOG2_E = math.log2(math.e)
TOLERANCE = 1e-6  # of a step, relative; Newton squares it, so the result is good to float32's round-off
CHUNK = 2**18  # numbers worked on at once: they stay in the cache, and a large set of logits needs no second copy


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

    @property
    def applied(self) -> TemperatureFit:
        """What other predictions get: this, but no change (T = 1) where it is the lower bound.

        Data without an error say that colder is better, not how cold. At the bound a single error of other data would
        cost 64 times its gap, so nothing is changed there; ``at_bound`` stays.

        Example:
            >>> fit = fit_temperature(torch.tensor([[3.0, 0.0]]), torch.tensor([0]))  # all right
            >>> fit.temperature, fit.applied.temperature, fit.applied.at_bound
            (0.015625, 1.0, True)
        """
        nothing = self.at_bound and self.temperature < 1
        return replace(self, temperature=1.0, nll_scaled=self.nll) if nothing else self


@dataclass(frozen=True)
class Temperature:
    """``softmax(z / temperature)``: a recalibrator that no fit can make less accurate.

    Attributes:
        temperature: T; above 1 it makes predictions less sure.
        at_bound: Whether there was none to find: T is the upper bound, or 1 in place of the lower one; see
            :attr:`TemperatureFit.applied`.

    Example:
        >>> Temperature(2.0)(torch.tensor([[2.0, 0.0]])).exp()
        tensor([[0.7311, 0.2689]])
    """

    name: ClassVar[str] = "temperature"
    keeps_order: ClassVar[bool] = True
    temperature: float
    at_bound: bool = False

    def __call__(self, logits: Tensor) -> Tensor:
        """Recalibrated log-probabilities, ``(R, K)``, at least float32."""
        z = logits if logits.dtype == torch.float64 else logits.float()
        log_q = (z / self.temperature).log_softmax(1)
        # Far from 0 nearly equal values become equal: by one unit in the last place the likeliest class stays ahead.
        top, ahead = z.argmax(1, keepdim=True), log_q.amax(1, keepdim=True)
        ahead = torch.where(log_q.argmax(1, keepdim=True) == top, ahead, ahead.nextafter(torch.ones_like(ahead)))
        return log_q.scatter(1, top, ahead)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {"name": self.name, "temperature": self.temperature, "at_bound": self.at_bound}

    @classmethod
    def load(cls, plain: Mapping[str, Any]) -> Temperature:
        """What :meth:`to_dict` wrote."""
        return cls(plain["temperature"], plain["at_bound"])


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
    weights = (u * (beta * LOG2_E)).exp2_()  # torch's exp takes several times as long on a CPU
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
    if not 0 < bounds[0] <= 1 <= bounds[1] < math.inf:
        raise ValueError(f"expected bounds of a temperature, 0 < lowest <= 1 <= highest, got {bounds}.")
    check_rows(logits, targets)


def check_rows(logits: Tensor, targets: Tensor) -> None:
    """Whether these are rows of logits, each with the class that is right.

    Raises:
        ValueError: If they are not.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"expected logits (R, K) and targets (R,), got {tuple(logits.shape)} and {tuple(targets.shape)}; "
            "LossCall.rows() makes them from other shapes."
        )
    lost = (targets < 0) | (targets >= logits.shape[1])
    if bool(lost.any()):
        raise ValueError(
            f"expected targets in [0, {logits.shape[1]}), got {sorted(set(targets[lost].tolist()))[:10]}; leave "
            "rows without a label out, and check the number of classes."
        )


def usable_rows(
    logits: Tensor, targets: Tensor, reduce: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The rows that a fit can use, as log-probabilities on the CPU.

    Args:
        logits: Logits or log-probabilities, ``(R, K)``, of any float type; half precision is raised to float32.
        targets: Right classes ``(R,)``.
        reduce: Sums two doubles over processes; called once.

    Returns:
        Log-probabilities ``(r, K)``, targets ``(r,)`` int64, which of the given rows these are, ``(R,)`` bool, and how
        many all processes have together. Rows whose loss is not finite (NaN, infinite) are left out, with a warning
        that counts them.

    Raises:
        ValueError: If shapes or labels are wrong, or if no row is left on any process.

    Example:
        >>> log_p, y, usable, n = usable_rows(torch.tensor([[3.0, 3.0]]), torch.tensor([1]))
        >>> log_p.exp(), usable, n
        (tensor([[0.5000, 0.5000]]), tensor([True]), 1)
    """
    check_rows(logits, targets)
    z = logits.detach()
    log_p = (z if z.dtype == torch.float64 else z.float()).log_softmax(1).cpu()
    y = targets.detach().cpu().long()
    usable = log_p.gather(1, y[:, None])[:, 0].isfinite()
    sums = torch.tensor([len(y), int(usable.sum())], dtype=torch.float64)
    given, kept = (int(value) for value in (sums if reduce is None else reduce(sums)).tolist())
    if not kept:
        raise ValueError(f"expected rows with a finite loss, got {given} rows, none such; look for NaN in the logits.")
    if given > kept:
        warnings.warn(f"{given - kept} of {given} rows have no finite loss; left out.", stacklevel=3)
    if given > kept:
        log_p, y = log_p[usable], y[usable]
    return log_p, y, usable, kept
