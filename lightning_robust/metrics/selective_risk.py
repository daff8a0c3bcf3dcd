"""Risk against coverage as a metric: logits in, sums of fixed size inside."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_robust.calibration.confidence_grid import ConfidenceGrid
from lightning_robust.calibration.functional import grid_of
from lightning_robust.metrics.doubles import SummedDoubles

__all__ = ["SelectiveRisk"]


class SelectiveRisk(SummedDoubles):
    """Area under the risk-coverage curve, in [0, 1]: how well confidence tells right from wrong predictions.

    The state is a grid of fixed size (96 KiB). Arguments are always logits.

    Args:
        **kwargs: torchmetrics' own, e.g. ``sync_on_compute``.

    Example:
        >>> import torch
        >>> metric = SelectiveRisk()
        >>> metric.update(torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor([0, 1, 1]))
        >>> metric.compute()  # mean of 0, 0 and 1/3: only the least sure is wrong
        tensor(0.1111)
        >>> round(metric.grid.coverage_at(risk=0.1), 3)
        0.741
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(ConfidenceGrid.zero().state(), "by_confidence", **kwargs)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch; arguments and errors as of :meth:`CalibrationError.update`."""
        self.add(grid_of(logits, targets).state())

    def compute(self) -> Tensor:
        """The area, a scalar; NaN if nothing was counted."""
        return self.value(self.grid.aurc)

    @property
    def grid(self) -> ConfidenceGrid:
        """What was counted: the curve, accuracy at a coverage, coverage at a risk; within ``sync_context()`` of all."""
        return ConfidenceGrid.load(self.total)
