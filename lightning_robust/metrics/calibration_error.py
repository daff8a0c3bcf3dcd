"""The expected calibration error as a metric: logits in, sums of fixed size inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_robust.calibration.reliability import Reliability
from lightning_robust.losses import LossCall

__all__ = ["CalibrationError"]


class CalibrationError(Metric):
    """Expected calibration error of the likeliest class, in [0, 1].

    The state is one tensor of ``3 bins + 3`` doubles, whatever the number of samples; two processes equal one. It stays
    double when the module around it is cast to half precision, because sums in less lose predictions.

    Arguments are always logits. They are never guessed to be probabilities, wherever their values lie.

    Args:
        bins: Bins of equal width; see :class:`~lightning_robust.calibration.Reliability`.
        **kwargs: torchmetrics' own, e.g. ``sync_on_compute``.

    Example:
        >>> metric = CalibrationError(bins=15)
        >>> metric.update(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))  # 88 % sure, one of two right
        >>> metric.compute()
        tensor(0.3808)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    total: Tensor

    def __init__(self, bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bins = bins
        self.add_state("total", Reliability.zero(bins).state(), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch.

        Args:
            logits: ``(N, K, ...)`` for classes; ``(N,)``, ``(N, 1)`` or ``(N, K)`` for yes/no outputs.
            targets: Classes ``(N, ...)``, rows of -100 left out; for yes/no outputs 0 or 1, floats if ``(N, K)``.

        Raises:
            ValueError: If the shapes fit no kind of head, or a target names no class.
        """
        log_probabilities, labels, _ = LossCall.for_head(logits, targets).rows()
        self.total = self.total + Reliability.of(log_probabilities, labels, self.bins).state().to(self.total.device)

    def compute(self) -> Tensor:
        """The error, a scalar; NaN if nothing was counted."""
        return torch.tensor(self.reliability.ece, dtype=torch.float32, device=self.device)

    @property
    def reliability(self) -> Reliability:
        """What was counted: error, interval, floor, NLL, Brier score; within ``sync_context()`` of all processes."""
        return Reliability.load(self.total)

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> Any:
        # torchmetrics' own hook. `.to(float16)` and `set_dtype` would round the sums, and MPS has no doubles.
        result = super()._apply(fn, exclude_state=("total",))
        self.total = self.total.to(torch.device("cpu") if self.device.type == "mps" else self.device)
        return result
