"""The base of metrics whose state is one tensor of doubles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["SummedDoubles"]


class SummedDoubles(Metric):
    """A metric with one state: a vector of doubles of fixed size that is summed over batches and processes.

    It stays double when the module around it is cast to half precision, because sums in less lose predictions.

    Args:
        total: The state of nothing counted.
        counts: What is counted, the state's name: a ``MetricCollection`` takes metrics whose states have one name and
            are equal after the first batch for one metric from then on.
        **kwargs: torchmetrics' own, e.g. ``sync_on_compute``.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, total: Tensor, counts: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._counts = counts
        self.add_state(counts, total, dist_reduce_fx="sum")

    @property
    def total(self) -> Tensor:
        """The state."""
        state: Tensor = getattr(self, self._counts)
        return state

    def add(self, state: Tensor) -> None:
        """Add what a batch counted."""
        # Not in place: under inference mode the sum would become a tensor that nothing outside may touch.
        setattr(self, self._counts, self.total + state.to(self.total.device))

    def value(self, number: float) -> Tensor:
        """A result as torchmetrics gives it, a float32 scalar on the metric's device."""
        return torch.tensor(number, dtype=torch.float32, device=self.device)

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> Any:
        # torchmetrics' own hook. `.to(float16)` and `set_dtype` would round the sums, and MPS has no doubles.
        result = super()._apply(fn, exclude_state=(self._counts,))
        device = torch.device("cpu") if self.device.type == "mps" else self.device
        setattr(self, self._counts, self.total.to(device))
        return result
