"""Predictions kept for a fit: at most so many, a random sample of all that came by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_robust.randomness import priorities

__all__ = ["Reservoir"]

LARGEST = 50_000_000  # numbers, 200 MB: with very many classes fewer predictions are kept
SLACK = 1.1  # of the rows that are kept: choosing anew for each batch would take long


class Reservoir:
    """Log-probabilities and labels of at most ``capacity`` predictions, those with the smallest random priority.

    The priority is a function of (seed, prediction), so that the sample depends neither on the order and size of
    batches nor on the number of processes. Rows are chosen where they are, and only those that are kept are copied to
    the CPU; it never holds more than 1.1 times as many as it keeps.

    Args:
        capacity: Predictions kept, over all processes; fewer where ``capacity * K`` is above 50 million numbers
            (200 MB), namely 50 million / K.
        seed: Of the priorities.
        largest: Another limit than those 50 million numbers.

    Raises:
        ValueError: If ``capacity`` is below 1.

    Example:
        >>> kept = Reservoir(capacity=2)
        >>> kept.add(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), torch.arange(4))
        >>> len(kept.rows()[0])
        2
    """

    def __init__(self, capacity: int, seed: int = 0, largest: int | None = None) -> None:
        if capacity < 1:
            raise ValueError(f"a reservoir keeps at least one prediction, got capacity {capacity}.")
        self.capacity, self.seed = capacity, seed
        self.largest = LARGEST if largest is None else largest
        self.offered = 0
        self._classes = 0
        self._largest = 1.0  # priority that is still kept; all are below 1
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
        self._limit(log_probabilities.shape[1])
        sample = sample.cpu()
        _, each = torch.unique_consecutive(sample, return_counts=True)
        position = torch.arange(len(sample)) - (each.cumsum(0) - each).repeat_interleave(each)
        priority = priorities((sample << 24) + position, self.seed)
        # Before anything is copied: a batch of pixels may be larger than all that is kept.
        if self._held + int((priority <= self._largest).sum()) > SLACK * self.capacity:
            self._choose(priority)
        chosen = (priority <= self._largest).nonzero()[:, 0]
        if len(chosen):
            rows = log_probabilities.detach()[chosen.to(log_probabilities.device)].float().cpu()
            own = labels[chosen.to(labels.device)].cpu()
            self._parts.append((rows, own, sample[chosen], priority[chosen]))
            self._held += len(own)

    def rows(
        self, summed: Callable[[Tensor], Tensor] | None = None, rank: int = 0, world: int = 1
    ) -> tuple[Tensor, ...]:
        """What this process keeps: log-probabilities ``(R, K)``, labels ``(R,)`` and sample numbers ``(R,)``.

        Args:
            summed: Sums a tensor of doubles over processes; ``None`` for one process.
            rank: Number of this process.
            world: How many there are.
        """
        if summed is not None:
            facts = torch.zeros(1 + world, dtype=torch.float64)
            facts[0], facts[1 + rank] = self.offered, self._classes
            facts = summed(facts)
            self._limit(int(facts[1:].max()))  # a process without samples does not know how many classes there are
        if self._held > self.capacity:
            self._choose()
        if summed is not None and int(facts[0]) > self.capacity:
            table = torch.full((world, self.capacity), 0.0, dtype=torch.float64)
            own = self._priorities()
            table[rank] = 2.0  # above every priority: an empty place
            table[rank, : len(own)] = own
            self._keep(float(summed(table).flatten().kthvalue(self.capacity).values))
        self._merge()
        if not self._parts:
            none = torch.zeros(0, dtype=torch.long)
            return torch.zeros(0, self._classes or 2), none, none
        return self._parts[0][:3]

    def _limit(self, classes: int) -> None:
        self._classes = max(self._classes, classes)
        self.capacity = max(1, min(self.capacity, self.largest // max(1, self._classes)))

    def _priorities(self) -> Tensor:
        return torch.cat([torch.zeros(0, dtype=torch.float64), *(part[3] for part in self._parts)])

    def _choose(self, *offered: Tensor) -> None:
        self._keep(float(torch.cat([self._priorities(), *offered]).kthvalue(self.capacity).values))

    def _keep(self, largest: float) -> None:
        self._largest = min(self._largest, largest)
        for i, part in enumerate(self._parts):  # one after the other: never two copies of all
            keep = part[3] <= self._largest
            if not bool(keep.all()):
                self._parts[i] = part[0][keep], part[1][keep], part[2][keep], part[3][keep]
        self._parts = [part for part in self._parts if len(part[1])]
        self._held = sum(len(part[1]) for part in self._parts)

    def _merge(self) -> None:
        """Make one part of all, letting go of each as it is copied."""
        if len(self._parts) < 2:
            return
        whole = tuple(column.new_empty(self._held, *column.shape[1:]) for column in self._parts[0])
        end = 0
        parts, self._parts = self._parts[::-1], []
        while parts:
            part = parts.pop()
            start, end = end, end + len(part[1])
            for column, own in zip(whole, part, strict=True):
                column[start:end] = own
        self._parts = [whole]  # type: ignore[list-item]  # a tuple of four, as its parts
