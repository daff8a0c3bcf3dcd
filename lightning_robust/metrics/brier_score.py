"""The Brier score as a metric: logits in, sums of fixed size inside."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_robust.calibration.functional import reliability_of
from lightning_robust.calibration.reliability import Reliability
from lightning_robust.metrics.doubles import SummedDoubles

__all__ = ["BrierScore"]


class BrierScore(SummedDoubles):
    """Mean squared error of all class probabilities, in [0, 2]; lowest, on average, for the true probabilities.

    For yes/no outputs it is twice scikit-learn's ``brier_score_loss``: both yes and no are counted. Arguments are
    always logits.

    Args:
        **kwargs: torchmetrics' own, e.g. ``sync_on_compute``.

    Example:
        >>> import torch
        >>> metric = BrierScore()
        >>> metric.update(torch.zeros(4, 2), torch.tensor([0, 1, 1, 0]))
        >>> metric.compute()
        tensor(0.5000)

    References:
        Brier, `Verification of Forecasts Expressed in Terms of Probability
        <https://doi.org/10.1175/1520-0493(1950)078%3C0001:VOFEIT%3E2.0.CO;2>`_, 1950.
    """

    plot_upper_bound = 2.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(Reliability.zero(1).state(), "of_all", **kwargs)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch; arguments and errors as of :meth:`CalibrationError.update`."""
        self.add(reliability_of(logits, targets, 1).state())

    def compute(self) -> Tensor:
        """The score, a scalar; NaN if nothing was counted."""
        return self.value(Reliability.load(self.total).mean_brier)
