"""The calibration error over bins of equal mass as a metric: logits in, sums of fixed size inside."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_robust.calibration.confidence_grid import ConfidenceGrid
from lightning_robust.calibration.functional import grid_of
from lightning_robust.metrics.doubles import SummedDoubles

__all__ = ["AdaptiveCalibrationError"]


class AdaptiveCalibrationError(SummedDoubles):
    """Calibration error of the likeliest class over bins that hold equally many predictions, in [0, 1].

    The bins come from a fine grid of fixed size (96 KiB) when the error is asked for, and never split predictions that
    are equally sure. Arguments are always logits.

    Args:
        bins: How many bins at most; see :meth:`~lightning_robust.calibration.ConfidenceGrid.adaptive`.
        **kwargs: torchmetrics' own, e.g. ``sync_on_compute``.

    Raises:
        ValueError: If there is not at least one bin.

    Example:
        >>> import torch
        >>> metric = AdaptiveCalibrationError()
        >>> metric.update(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))  # 88 % sure, one of two right
        >>> metric.compute()
        tensor(0.3808)
    """

    def __init__(self, bins: int = 15, **kwargs: Any) -> None:
        nothing = ConfidenceGrid.zero()
        nothing.adaptive(bins)
        super().__init__(nothing.state(), "by_confidence", **kwargs)
        self.bins = bins

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch; arguments and errors as of :meth:`CalibrationError.update`."""
        self.add(grid_of(logits, targets).state())

    def compute(self) -> Tensor:
        """The error, a scalar; NaN if nothing was counted."""
        return self.value(self.grid.adaptive(self.bins))

    @property
    def grid(self) -> ConfidenceGrid:
        """What was counted; within ``sync_context()`` of all processes."""
        return ConfidenceGrid.load(self.total)
