"""Vector scaling: a slope and an offset for each class, found by L-BFGS with derivatives in closed form."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_robust.calibration.temperature import CHUNK, fit_temperature, usable_rows

__all__ = ["VectorScaling", "fit_vector"]

RIDGE = 1.0  # the prior weighs as much as a few rows of each class
MAX_STEPS = 300
MEMORY = 20  # pairs that L-BFGS remembers
TOLERANCE = 1e-12  # of what is still to be gained, in nats


@dataclass(frozen=True, eq=False)
class VectorScaling:
    """``softmax(scale * log p + bias)``, one slope and one offset for each class.

    Log-probabilities stand in for the logits, because the sum of a row's logits means nothing to softmax but would to
    ``scale``: so logits and their log-probabilities give the same result.

    Attributes:
        scale: Slopes, ``(K,)`` float64.
        bias: Offsets, ``(K,)`` float64.
        at_bound: Whether the temperature that the fit started from lies at a bound: the data held no error, or the
            logits say nothing about the labels.

    Example:
        >>> even = VectorScaling(torch.ones(2), torch.tensor([1.0, 0.0]))
        >>> even(torch.tensor([[0.0, 1.0]])).exp()
        tensor([[0.5000, 0.5000]])
    """

    name: ClassVar[str] = "vector"
    keeps_order: ClassVar[bool] = False
    scale: Tensor
    bias: Tensor
    at_bound: bool = False

    def __call__(self, logits: Tensor) -> Tensor:
        """Recalibrated log-probabilities, ``(R, K)``, at least float32; ``-inf`` stays.

        Raises:
            ValueError: If the number of classes is another one.
        """
        if logits.ndim != 2 or logits.shape[1] != len(self.scale):
            raise ValueError(f"expected logits (R, {len(self.scale)}), as fitted, got {tuple(logits.shape)}.")
        z = logits if logits.dtype == torch.float64 else logits.float()
        return _scaled(z.log_softmax(1), self.scale.to(z), self.bias.to(z))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {
            "name": self.name,
            "scale": self.scale.tolist(),
            "bias": self.bias.tolist(),
            "at_bound": self.at_bound,
        }

    @classmethod
    def load(cls, plain: Mapping[str, Any]) -> VectorScaling:
        """What :meth:`to_dict` wrote."""
        scale, bias = (torch.tensor(plain[key], dtype=torch.float64) for key in ("scale", "bias"))
        return cls(scale, bias, plain["at_bound"])


def fit_vector(logits: Tensor, labels: Tensor, *, reduce: Callable[[Tensor], Tensor] | None = None) -> VectorScaling:
    r"""The slopes and offsets with the smallest penalised negative log-likelihood.

    The loss is convex in both, and the fit starts from the best temperature T:

    .. math:: L(w, b) = \overline{\log \textstyle\sum_k e^{w_k z_k + b_k} - w_y z_y - b_y}
              + \frac{1}{2n} \left( \|T w - 1\|^2 + \|b\|^2 \right)

    with :math:`z = \log p` and n rows; T = 1 where there is no error to fit it on. The penalty is a normal prior of
    standard deviation 1 around the temperature: it decides where a class has no row or no error, keeps the optimum
    finite, and vanishes as data come. It is 0 at the start, so the likelihood is never worse than the temperature's.
    With 2 K parameters the fit flatters the data it was made of: report numbers of other data
    (:func:`~lightning_robust.calibration.cross_fitted`).

    Args:
        logits: Logits or log-probabilities, ``(R, K)``, of any float type. ``-inf`` switches a class off. A process
            without rows gives ``(0, K)``.
        labels: Right classes ``(R,)``, integers in ``[0, K)``.
        reduce: Sums a double tensor on the CPU, ``(5 K + 1,)`` at most, over processes; every process calls it equally
            often and gets the same fit. ``None`` for one process.

    Returns:
        The fit. Rows whose loss is not finite are left out, with a warning that counts them.

    Raises:
        ValueError: If shapes or labels are wrong, or if no row is left.

    Example:
        >>> z, y = torch.tensor([[2.0, 0.0]]).expand(10_000, 2), (torch.arange(10_000) >= 6000).long()
        >>> fit_vector(z, y)(z[:1]).exp()  # 88 % sure, 60 % right
        tensor([[0.6000, 0.4000]])

    References:
        Guo et al., `On Calibration of Modern Neural Networks <https://arxiv.org/abs/1706.04599>`_, 2017, section 4.2;
        Nocedal and Wright, Numerical Optimization, 2006, algorithm 7.4 (L-BFGS).
    """
    log_p, y, _, n = usable_rows(logits, labels, reduce)
    start = fit_temperature(log_p, y, reduce=reduce).applied
    objective = _Objective(log_p, y, n, 1 / start.temperature, reduce)
    scale, bias = _minimum(objective)
    return VectorScaling(scale / start.temperature, bias, start.at_bound)


def _scaled(log_p: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    off = log_p == -torch.inf  # times a slope of 0 it would be no number
    return (log_p.masked_fill(off, 0) * scale + bias).masked_fill_(off, -torch.inf).log_softmax(1)


class _Objective:
    """The penalised mean loss as a function of ``T w`` and ``b``, stacked to ``(2, K)``, over all processes' rows."""

    def __init__(
        self, log_p: Tensor, labels: Tensor, n: int, beta: float, reduce: Callable[[Tensor], Tensor] | None
    ) -> None:
        self._log_p, self._labels, self._n, self._beta, self._reduce = log_p, labels, n, beta, reduce
        self.start = torch.tensor([[1.0], [0.0]], dtype=torch.float64).repeat(1, log_p.shape[1])

    def __call__(self, theta: Tensor) -> tuple[float, Tensor, Tensor]:
        """Loss, gradient ``(2, K)``, and the Hessian's block of each class, ``(3, K)``: ww, wb, bb."""
        classes = theta.shape[1]
        loss, sums = 0.0, torch.zeros(5, classes, dtype=torch.float64)
        size = max(1, CHUNK // classes)
        for at in range(0, len(self._log_p), size):
            z, y = self._log_p[at : at + size].double() * self._beta, self._labels[at : at + size]
            log_q = _scaled(z, *theta)
            right = y[:, None]
            loss -= float(log_q.gather(1, right).sum())
            q = log_q.exp_()
            z = z.masked_fill_(z == -torch.inf, 0)  # such a class has q = 0
            spread = q - q.square()
            excess = q.scatter_add_(1, right, q.new_full(right.shape, -1.0))
            sums[0] += (excess * z).sum(0)
            sums[1] += excess.sum(0)
            for row in (4, 3, 2):
                sums[row] += spread.sum(0)
                spread = spread.mul_(z)
        flat = torch.cat([torch.tensor([loss], dtype=torch.float64), sums.flatten()])
        flat = flat if self._reduce is None else self._reduce(flat)
        away, sums = theta - self.start, flat[1:].view(5, classes) / self._n
        ridge = RIDGE / self._n
        value = float(flat[0]) / self._n + ridge / 2 * float(away.square().sum())
        return (
            value,
            sums[:2] + ridge * away,
            sums[2:] + ridge * torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64),
        )


def _minimum(objective: _Objective) -> Tensor:
    """L-BFGS, started from the inverse of each class's own 2 x 2 block of the Hessian."""
    theta = objective.start
    value, slope, block = objective(theta)
    pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=MEMORY)
    for _ in range(MAX_STEPS):
        step = -_inverse_times(slope, pairs, block)
        gain = -float((slope * step).sum())
        if gain <= TOLERANCE:
            break
        length = 1.0
        new = objective(theta + step)
        while new[0] > value - 1e-4 * length * gain and length > 1e-9:
            length /= 2
            new = objective(theta + length * step)
        if new[0] >= value:  # round-off: nothing more to be gained
            break
        pairs.append((length * step, new[1] - slope))
        theta = theta + length * step
        value, slope, block = new
    return theta


def _inverse_times(slope: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], block: Tensor) -> Tensor:
    """The two-loop recursion."""
    weights: list[Tensor] = []
    direction = slope
    for step, change in reversed(pairs):
        weights.append((step * direction).sum() / (step * change).sum())
        direction = direction - weights[-1] * change
    ww, wb, bb = block
    w, b = direction
    direction = torch.stack([bb * w - wb * b, ww * b - wb * w]).div(ww * bb - wb.square())
    for (step, change), weight in zip(pairs, reversed(weights), strict=True):
        direction = direction + (weight - (change * direction).sum() / (step * change).sum()) * step
    return direction
