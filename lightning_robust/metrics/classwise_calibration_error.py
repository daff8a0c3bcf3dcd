"""The calibration error of every class as a metric: logits in, sums of fixed size inside."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_robust.calibration.classwise import Classwise
from lightning_robust.calibration.functional import classwise_of
from lightning_robust.metrics.doubles import SummedDoubles

__all__ = ["ClasswiseCalibrationError"]


class ClasswiseCalibrationError(SummedDoubles):
    """Mean calibration error of each class, or label, against the rest, over those that are ever right; in [0, 1].

    The state is one tensor of ``3 classes (bins + 1) + 1`` doubles. Arguments are always logits.

    Args:
        classes: How many; 2 for a single yes/no output.
        bins: Bins of equal width; see :class:`~lightning_robust.calibration.Classwise`.
        **kwargs: torchmetrics' own, e.g. ``sync_on_compute``.

    Raises:
        ValueError: If there is not at least one class and one bin.

    Example:
        >>> import torch
        >>> metric = ClasswiseCalibrationError(classes=2)
        >>> metric.update(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.1192)
    """

    def __init__(self, classes: int, bins: int = 15, **kwargs: Any) -> None:
        super().__init__(Classwise.zero(classes, bins).state(), "by_class", **kwargs)
        self.classes, self.bins = classes, bins

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch; arguments and errors as of :meth:`CalibrationError.update`.

        Raises:
            ValueError: If there are more or fewer classes than announced.
        """
        counted = classwise_of(logits, targets, self.bins)
        found = counted.table.shape[1]
        if found != self.classes:
            raise ValueError(f"expected logits of {self.classes} classes, got {found}; give classes={found}.")
        self.add(counted.state())

    def compute(self) -> Tensor:
        """The error, a scalar; NaN if nothing was counted."""
        return self.value(self.classwise.ece)

    @property
    def classwise(self) -> Classwise:
        """What was counted: the error of each class, the worst of them; within ``sync_context()`` of all processes."""
        return Classwise.load(self.total, self.classes)
