"""Training features kept for a detector: at most so many, a random sample of all that came by."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.ood.feature_rows import Summed, agreed
from lightning_robust.randomness import priorities

__all__ = ["FeatureBank"]

SLACK = 1.5  # of the rows that are kept: choosing anew for each batch would take long
LONGEST = 2**28  # samples that processes can agree about: a table of doubles with a place for each


class FeatureBank:
    """Features of at most ``capacity`` samples, those with the smallest random priority, in the order of the data.

    The priority is a function of (seed, number of the sample), so that the bank depends neither on the order and size
    of batches nor on the number of processes.

    Args:
        capacity: Samples kept, over all processes.
        seed: Of the priorities.

    Raises:
        ValueError: If ``capacity`` is below 1.

    Example:
        >>> bank = FeatureBank(capacity=2)
        >>> bank.add(torch.arange(8.0).view(4, 2), torch.arange(4))
        >>> bank.rows().shape
        torch.Size([2, 2])
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        if capacity < 1:
            raise ValueError(f"a bank keeps the features of at least one sample, got capacity {capacity}.")
        self.capacity, self.seed = capacity, seed
        self._largest = 1.0  # priority that is still kept; all are below 1
        self._rows: list[Tensor] = []
        self._index: list[Tensor] = []
        self._held = 0

    def add(self, features: Tensor, index: Tensor) -> None:
        """Offer features.

        Args:
            features: ``(N, D)``, kept in float32 on the CPU.
            index: Number of each sample among all samples, ``(N,)``, from 0.

        Raises:
            ValueError: If a number is negative.
        """
        if not len(index):
            return
        index = index.cpu().long()
        if int(index.min()) < 0:
            raise ValueError(f"expected numbers of samples from 0, got {int(index.min())}.")
        chosen = (priorities(index, self.seed) <= self._largest).nonzero()[:, 0]
        if not len(chosen):
            return
        self._rows.append(features.detach()[chosen.to(features.device)].float().cpu())
        self._index.append(index[chosen])
        self._held += len(chosen)
        if self._held > SLACK * self.capacity:
            self._choose()

    def rows(self) -> Tensor:
        """The features that are kept, ``(R, D)`` float32 with R at most ``capacity``; ``(0, 0)`` if none came."""
        self._choose()
        return self._rows[0] if self._rows else torch.zeros(0, 0)

    def reduce(self, summed: Summed) -> None:
        """Keep, in every process, what one process would have kept of the samples of all.

        A sample that several processes have counts once.

        Args:
            summed: Sums over processes, each of which calls this once.

        Raises:
            ValueError: If processes have features of different width, or the numbers of samples do not count them.
        """
        own = self.rows()
        sizes = agreed([own.shape[1]] if self._held else None, summed)
        if not sizes:
            return
        index = self._index[0] if self._index else torch.zeros(0, dtype=torch.long)
        bits = torch.zeros(64, dtype=torch.float64)
        bits[int(index.max()).bit_length() if len(index) else 0] = 1.0
        longest = 2 ** int(summed(bits).nonzero().max())
        if longest > LONGEST:
            raise ValueError(
                f"expected the numbers of samples to count them, got some above {longest // 2}, which processes cannot "
                f"agree about (at most {LONGEST}); number the samples of the training set from 0."
            )
        holders = torch.zeros(longest, dtype=torch.float64)
        holders[index] = 1.0
        holders = summed(holders)
        everyones = holders.nonzero()[:, 0]
        kept = everyones[priorities(everyones, self.seed).argsort()[: self.capacity]].sort().values
        # Every sample has its place, so that a sum of places loses nothing.
        places = torch.zeros(len(kept), sizes[0], dtype=torch.float64)
        mine = torch.isin(index, kept)
        places[torch.searchsorted(kept, index[mine])] = own.view(-1, sizes[0])[mine].double()
        self._rows = [(summed(places) / holders[kept, None]).float()]
        self._index, self._held = [kept], len(kept)

    def _choose(self) -> None:
        """One part of all, the ``capacity`` samples of smallest priority, by their numbers."""
        if not self._rows:
            return
        rows, index = torch.cat(self._rows), torch.cat(self._index)
        priority = priorities(index, self.seed)
        order = priority.argsort(stable=True)[: self.capacity]
        if len(index) > self.capacity:
            self._largest = float(priority[order[-1]])
        order = order[index[order].argsort(stable=True)]
        self._rows, self._index, self._held = [rows[order]], [index[order]], len(order)
