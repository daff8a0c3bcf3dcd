"""Predictions kept for a fit: at most so many, a random sample of all that came by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_robust.randomness import priorities

__all__ = ["Reservoir"]


class Reservoir:
    """Log-probabilities and labels of at most ``capacity`` predictions, those with the smallest random priority.

    The priority is a function of (seed, prediction), so that the sample depends neither on the order and size of
    batches nor on the number of processes.

    Args:
        capacity: Predictions kept, over all processes.
        seed: Of the priorities.

    Example:
        >>> kept = Reservoir(capacity=2)
        >>> kept.add(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), torch.arange(4))
        >>> len(kept.rows()[0])
        2
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        if capacity < 1:
            raise ValueError(f"a reservoir keeps at least one prediction, got capacity {capacity}.")
        self.capacity, self.seed = capacity, seed
        self.offered = 0
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._held = 0

    def add(self, log_probabilities: Tensor, labels: Tensor, sample: Tensor) -> None:
        """Offer predictions.

        Args:
            log_probabilities: ``(R, K)``.
            labels: ``(R,)``.
            sample: Number of the sample that each belongs to among all samples, ``(R,)``; rows of one sample (pixels)
                stand together.
        """
        if not len(labels):
            return
        self.offered += len(labels)
        sample = sample.cpu()
        _, each = torch.unique_consecutive(sample, return_counts=True)
        position = torch.arange(len(sample)) - (each.cumsum(0) - each).repeat_interleave(each)
        priority = priorities((sample << 24) + position, self.seed)
        # A part by itself may be larger than all that is kept: pixels of a batch.
        keep = priority <= priority.kthvalue(self.capacity).values if len(priority) > self.capacity else slice(None)
        rows = log_probabilities.detach().float().cpu()
        self._parts.append((rows[keep], labels.cpu()[keep], sample[keep], priority[keep]))
        self._held += len(self._parts[-1][1])
        if self._held > 2 * self.capacity:
            self._shrink(self.capacity)

    def rows(
        self, summed: Callable[[Tensor], Tensor] | None = None, rank: int = 0, world: int = 1
    ) -> tuple[Tensor, ...]:
        """What this process keeps: log-probabilities ``(R, K)``, labels ``(R,)`` and sample numbers ``(R,)``.

        Args:
            summed: Sums a tensor of doubles over processes; ``None`` for one process.
            rank: Number of this process.
            world: How many there are.
        """
        self._shrink(self.capacity)
        if summed is not None and int(summed(torch.tensor([self.offered], dtype=torch.float64))) > self.capacity:
            table = torch.full((world, self.capacity), 0.0, dtype=torch.float64)
            own = self._parts[0][3] if self._parts else torch.zeros(0, dtype=torch.float64)
            table[rank] = 2.0  # above every priority: an empty place
            table[rank, : len(own)] = own
            self._keep(float(summed(table).flatten().kthvalue(self.capacity).values))
        if not self._parts:
            return torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        return self._parts[0][:3]

    def _shrink(self, size: int) -> None:
        if not self._parts:
            return
        self._parts = [tuple(torch.cat(column) for column in zip(*self._parts, strict=True))]  # type: ignore[list-item]  # a tuple of four, as before
        priority = self._parts[0][3]
        if len(priority) > size:
            self._keep(float(priority.kthvalue(size).values))
        self._held = len(self._parts[0][1])

    def _keep(self, largest: float) -> None:
        if self._parts:
            keep = self._parts[0][3] <= largest
            self._parts = [tuple(column[keep] for column in self._parts[0])]  # type: ignore[list-item]  # a tuple of four, as before
            self._held = int(keep.sum())
