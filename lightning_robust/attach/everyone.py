"""All processes of a run: sums over them, of what some of them may not have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Everyone"]


@dataclass(frozen=True)
class Everyone:
    """All processes.

    Attributes:
        trainer: Its processes.
        summed: Sums a tensor of doubles over them.
    """

    trainer: Any
    summed: Callable[[Tensor], Tensor]

    @property
    def reduce(self) -> Callable[[Tensor], Tensor] | None:
        """What fits take; None for one process."""
        return None if self.trainer.world_size == 1 else self.summed

    def total(self, *counts: int) -> list[int]:
        """Integers, summed."""
        return [int(n) for n in self.summed(torch.tensor(counts, dtype=torch.float64))]

    def of(self, state: Tensor | None) -> Tensor | None:
        """A state of doubles, summed; a process that has none, and does not know its size, gives None as all may."""
        if self.trainer.world_size == 1:
            return state
        sizes = torch.zeros(self.trainer.world_size, dtype=torch.float64)
        sizes[self.trainer.global_rank] = 0 if state is None else len(state)
        size = int(self.summed(sizes).max())
        if not size:
            return None
        return self.summed(torch.zeros(size, dtype=torch.float64) if state is None else state)
