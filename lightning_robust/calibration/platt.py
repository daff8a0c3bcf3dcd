"""Platt scaling: a slope and an intercept for yes/no outputs, one or many at once, by Newton's method."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.calibration.temperature import usable_rows

__all__ = ["PlattLabels", "PlattScaling", "fit_platt", "fit_platt_labels"]

MAX_PASSES = 64
TOLERANCE = 1e-8  # of a step, for scores of standard deviation 1; Newton squares it
FLAT = 1e-12  # ratio of curvatures below which data say nothing about one direction


@dataclass(frozen=True)
class PlattScaling:
    """``sigmoid(slope * s + intercept)`` for two classes, with ``s = z_1 - z_0``.

    The intercept moves the threshold, so accuracy may change.

    Attributes:
        slope: Of the log-odds.
        intercept: In nats.
        at_bound: Whether the data have no optimum (one class only, no error at all, or one score for all rows). Then
            nothing is changed: the slope is 1, the intercept 0.

    Example:
        >>> PlattScaling(slope=0.5, intercept=-1.0)(torch.tensor([[0.0, 2.0]])).exp()
        tensor([[0.5000, 0.5000]])
    """

    name: ClassVar[str] = "platt"
    keeps_order: ClassVar[bool] = False
    slope: float
    intercept: float
    at_bound: bool = False

    def __call__(self, logits: Tensor) -> Tensor:
        """Recalibrated log-probabilities, ``(R, 2)``, at least float32.

        Raises:
            ValueError: If there are not two classes.
        """
        _check_two(logits)
        yes = _log_odds(logits) * self.slope + self.intercept
        return F.logsigmoid(torch.stack([-yes, yes], dim=1))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {"name": self.name, "slope": self.slope, "intercept": self.intercept, "at_bound": self.at_bound}

    @classmethod
    def load(cls, plain: Mapping[str, Any]) -> PlattScaling:
        """What :meth:`to_dict` wrote."""
        return cls(plain["slope"], plain["intercept"], plain["at_bound"])


@dataclass(frozen=True, eq=False)
class PlattLabels:
    """Platt scaling of a multi-label head: ``slope * z + intercept``, one pair for each of L labels.

    Attributes:
        slope: ``(L,)`` float64.
        intercept: ``(L,)`` float64.
        at_bound: Which labels have no optimum (one class only, no error, or one score for all) and stay as they are,
            ``(L,)`` bool.

    Example:
        >>> fit = PlattLabels(torch.tensor([0.5, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor([False, False]))
        >>> fit(torch.ones(1, 2))
        tensor([[0.5000, 2.0000]])
    """

    slope: Tensor
    intercept: Tensor
    at_bound: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """Recalibrated logits, ``(N, L)``, at least float32.

        Raises:
            ValueError: If the number of labels is another one.
        """
        if z.ndim != 2 or z.shape[1] != len(self.slope):
            raise ValueError(f"expected logits (N, {len(self.slope)}), as fitted, got {tuple(z.shape)}.")
        z = z if z.dtype == torch.float64 else z.float()
        return z * self.slope.to(z) + self.intercept.to(z)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {key: getattr(self, key).tolist() for key in ("slope", "intercept", "at_bound")}

    @classmethod
    def load(cls, plain: Mapping[str, Any]) -> PlattLabels:
        """What :meth:`to_dict` wrote."""
        slope, intercept = (torch.tensor(plain[key], dtype=torch.float64) for key in ("slope", "intercept"))
        return cls(slope, intercept, torch.tensor(plain["at_bound"], dtype=torch.bool))


def fit_platt(
    logits: Tensor,
    labels: Tensor,
    *,
    smoothed: bool = False,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> PlattScaling:
    r"""The slope and the intercept with the smallest negative log-likelihood, for two classes.

    Args:
        logits: Logits or log-probabilities, ``(R, 2)``, of any float type. A process without rows gives ``(0, 2)``.
        labels: Right classes ``(R,)``, 0 or 1.
        smoothed: Fit to Platt's targets, :math:`(n_+ + 1) / (n_+ + 2)` and :math:`1 / (n_- + 2)`, in place of 1 and 0.
            He needed them because he fitted on the data that his machines were trained on. On held-out data they only
            pull probabilities towards the middle, so they are off; but with them every set of two different scores has
            an optimum.
        reduce: Sums a small double tensor on the CPU over processes; every process calls it equally often and gets the
            same fit. ``None`` for one process.

    Returns:
        The fit; ``at_bound`` flags data without an optimum. Rows whose loss is not finite are left out, with a warning
        that counts them.

    Raises:
        ValueError: If there are not two classes, if shapes or labels are wrong, or if no row is left.

    Example:
        >>> z = torch.tensor([[0.0, 2.0], [0.0, -2.0]]).repeat_interleave(10, 0)
        >>> y = torch.tensor([1] * 9 + [0] + [1] * 2 + [0] * 8)  # 9 of 10 where s = 2, 2 of 10 where s = -2
        >>> fit_platt(z, y)(z[[0, 10]])[:, 1].exp()
        tensor([0.9000, 0.2000])

    References:
        Platt, Probabilistic Outputs for Support Vector Machines and Comparisons to Regularized Likelihood Methods,
        1999; Lin, Lin and Weng, `A Note on Platt's Probabilistic Outputs for Support Vector Machines
        <https://doi.org/10.1007/s10994-007-5018-6>`_, 2007.
    """
    _check_two(logits)
    log_p, y, _, _ = usable_rows(logits, labels, reduce)
    s = _log_odds(log_p).double()[:, None]
    slope, intercept, at_bound = _newton(s, y.double()[:, None], torch.ones_like(s), smoothed, reduce)
    return PlattScaling(float(slope), float(intercept), bool(at_bound))


def fit_platt_labels(
    z: Tensor,
    y: Tensor,
    *,
    smoothed: bool = False,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> PlattLabels:
    """Platt scaling for each label of a multi-label head, all in one go.

    Args:
        z: Logits ``(N, L)`` of independent yes/no outputs, of any float type.
        y: ``(N, L)``, 0 or 1, of any type.
        smoothed: See :func:`fit_platt`.
        reduce: Sums a ``(8, L)`` double tensor on the CPU over processes.

    Returns:
        The fit. Labels without an optimum are flagged and left as they are. Logits that are not finite are left out of
        their label's fit, with a warning that counts them.

    Raises:
        ValueError: If shapes differ or targets are neither 0 nor 1.

    Example:
        >>> z = torch.tensor([[2.0, 3.0], [2.0, 1.0], [-2.0, 0.0], [-2.0, 2.0]])
        >>> fit = fit_platt_labels(z, torch.tensor([[1, 1], [0, 1], [0, 1], [1, 1]]))
        >>> fit.at_bound  # of the second label there is one class only
        tensor([False,  True])

    References:
        See :func:`fit_platt`.
    """
    if z.ndim != 2 or y.shape != z.shape:
        raise ValueError(f"expected logits (N, L) and as many targets, got {tuple(z.shape)} and {tuple(y.shape)}.")
    if not bool(((y == 0) | (y == 1)).all()):
        raise ValueError("expected targets of 0 or 1 in each label; leave rows without a label out.")
    s = z.detach().cpu().double()
    used = s.isfinite()
    given = torch.tensor([used.numel(), int(used.sum())], dtype=torch.float64)
    total, kept = (given if reduce is None else reduce(given)).tolist()
    if total > kept:
        warnings.warn(f"{total - kept:.0f} of {total:.0f} logits are not finite; left out.", stacklevel=2)
    return PlattLabels(*_newton(s.masked_fill(~used, 0), y.detach().cpu().double(), used.double(), smoothed, reduce))


def _check_two(logits: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] != 2:
        raise ValueError(
            f"Platt scaling is for two classes, logits (R, 2); got {tuple(logits.shape)}. For more classes take "
            "'vector' (fit_vector), for a multi-label head fit_platt_labels."
        )


def _log_odds(logits: Tensor) -> Tensor:
    """``z_1 - z_0``, finite where a class is switched off, so that a slope of 0 makes it 0."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    largest = torch.finfo(z.dtype).max
    return (z[:, 1] - z[:, 0]).clamp(-largest, largest)


def _newton(
    s: Tensor, y: Tensor, weight: Tensor, smoothed: bool, reduce: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Slope, intercept and a flag for each column of ``(N, L)`` doubles, rows weighted 0 or 1."""

    def summed(*sums: Tensor) -> Tensor:
        stacked = torch.stack(sums)
        return stacked if reduce is None else reduce(stacked)

    n, yes, first, second = summed(weight.sum(0), (weight * y).sum(0), (weight * s).sum(0), (weight * s * s).sum(0))
    centre = first / n
    spread = (second / n - centre.square()).clamp(min=0).sqrt()
    # Scores are standardised, because what counts as small and as flat depends on their unit.
    lost = (n == 0) | ~(spread > 1e-12 * centre.abs())
    t = torch.where(lost, 0.0, (s - centre) / torch.where(lost, 1.0, spread))
    target = torch.where(y > 0, (yes + 1) / (yes + 2), 1 / (n - yes + 2)) if smoothed else y

    def evaluate(a: Tensor, b: Tensor) -> Tensor:
        f = a * t + b
        p = f.sigmoid()
        loss = F.softplus(f) - target * f
        slope, curvature = p - target, p * (1 - p)
        wrong = (torch.where(y > 0, f, -f) <= 0).double()
        parts = (loss, slope * t, slope, curvature * t * t, curvature * t, curvature, wrong)
        return summed(*((weight * part).sum(0) for part in parts))

    # From a slope of 0 Newton needs few steps, however wrong the unit of the scores is.
    a, b = torch.zeros_like(n), torch.log((yes + 0.5) / (n - yes + 0.5))
    at = evaluate(a, b)
    running, found = ~lost, torch.zeros_like(lost)
    step_a, step_b, flat = _step(at)
    for _ in range(MAX_PASSES):
        # Where no row is on the wrong side, a steeper slope is always better.
        none = flat if smoothed else flat | (at[6] == 0)
        running, lost = running & ~none, lost | (running & none)
        small = step_a.abs() + step_b.abs() <= TOLERANCE * (1 + a.abs() + b.abs())
        tried_a, tried_b = torch.where(running, a + step_a, a), torch.where(running, b + step_b, b)
        tried = evaluate(tried_a, tried_b)
        worse = running & (tried[0] > at[0] * (1 + 1e-13)) & ~small
        a, b = torch.where(worse, a, tried_a), torch.where(worse, b, tried_b)
        at = torch.where(worse, at, tried)
        done = running & small
        found, running = found | done, running & ~done
        if not bool(running.any()):
            break
        newton_a, newton_b, flat = _step(at)
        step_a, step_b = torch.where(worse, step_a / 2, newton_a), torch.where(worse, step_b / 2, newton_b)
    slope = torch.where(found, a / torch.where(found, spread, 1.0), 1.0)
    return slope, torch.where(found, b - slope * centre, 0.0), ~found


def _step(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Newton's step for slope and intercept, and whether the loss is flat in some direction."""
    _, slope_a, slope_b, aa, ab, bb, _ = at
    area = aa * bb - ab.square()
    flat = ~(area > FLAT * (aa + bb).square())
    area = torch.where(flat, 1.0, area)
    return (ab * slope_b - bb * slope_a) / area, (ab * slope_a - aa * slope_b) / area, flat
