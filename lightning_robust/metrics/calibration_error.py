"""The expected calibration error as a metric: logits in, sums of fixed size inside."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_robust.calibration.functional import Mode, check_mode, reliability_of
from lightning_robust.calibration.reliability import Norm, Reliability
from lightning_robust.metrics.doubles import SummedDoubles

__all__ = ["CalibrationError"]


class CalibrationError(SummedDoubles):
    """Calibration error of the likeliest class, or of the probability of yes, in [0, 1].

    The state is one tensor of ``3 bins + 4`` doubles, whatever the number of samples; two processes equal one.

    Arguments are always logits. They are never guessed to be probabilities, wherever their values lie.

    Args:
        bins: Bins of equal width; see :class:`~lightning_robust.calibration.Reliability`.
        norm: ``l1``, ``rms``, ``max`` or ``debiased`` (of squares, and below 0 at times).
        mode: ``top_label``, ``positive`` or ``per_label``; norms and modes are those of
            :func:`~lightning_robust.calibration.calibration_error`.
        **kwargs: torchmetrics' own, e.g. ``sync_on_compute``.

    Raises:
        ValueError: If there is no such norm or mode, or not at least one bin.

    Example:
        >>> import torch
        >>> metric = CalibrationError(bins=15)
        >>> metric.update(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))  # 88 % sure, one of two right
        >>> metric.compute()
        tensor(0.3808)
    """

    def __init__(self, bins: int = 15, norm: Norm = "l1", mode: Mode = "top_label", **kwargs: Any) -> None:
        nothing = Reliability.zero(bins)
        nothing.error(norm)
        check_mode(mode)
        super().__init__(nothing.state(), f"by_{mode}", **kwargs)
        self.bins, self.norm, self.mode = bins, norm, mode

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch.

        Args:
            logits: ``(N, K, ...)`` for classes; ``(N,)``, ``(N, 1)`` or ``(N, K)`` for yes/no outputs.
            targets: Classes ``(N, ...)``, rows of -100 left out; for yes/no outputs 0 or 1, floats if ``(N, K)``.

        Raises:
            ValueError: If the shapes fit no kind of head, the head does not fit the mode, or a target names no class.
        """
        self.add(reliability_of(logits, targets, self.bins, self.mode).state())

    def compute(self) -> Tensor:
        """The error, a scalar; NaN if nothing was counted."""
        return self.value(self.reliability.error(self.norm))

    @property
    def reliability(self) -> Reliability:
        """What was counted: error, interval, floor, NLL, Brier score; within ``sync_context()`` of all processes."""
        return Reliability.load(self.total)
