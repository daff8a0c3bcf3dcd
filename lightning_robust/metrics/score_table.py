"""Several scores of each single sample, of the first so many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["ScoreTable"]

_SEEN, _FIRST_SCORE = 0, 1  # rows of the table


class ScoreTable:
    """A table of the scores of the first ``capacity`` samples by their global index.

    The order of batches means nothing, and neither does the number of processes: all state is one tensor of doubles
    that is summed over them (:meth:`state`, :meth:`load`). A sample that several of them saw counts once.

    Args:
        names: Names of the scores.
        capacity: How many samples are kept.

    Example:
        >>> table = ScoreTable(["energy"], capacity=3)
        >>> table.add(torch.tensor([2, 0, 7]), {"energy": torch.tensor([-1.0, -5.0, 0.0])})
        >>> table.n, table.of("energy").tolist()
        (2, [-5.0, -1.0])
    """

    def __init__(self, names: Sequence[str], capacity: int) -> None:
        self.names = list(names)
        self._table = torch.zeros(_FIRST_SCORE + len(self.names), capacity, dtype=torch.float64)

    def add(self, index: Tensor, scores: Mapping[str, Tensor]) -> None:
        """Scores of one batch.

        Args:
            index: Global indices ``(N,)``; those not below the capacity are passed over.
            scores: For each of the names, scores ``(N,)``.

        Raises:
            ValueError: If a score is missing, is not one of the names, or has another shape than the indices.
        """
        if set(scores) != set(self.names):
            raise ValueError(f"expected the scores {sorted(self.names)}, got {sorted(scores)}.")
        kept = (index < self._table.shape[1]).cpu()
        places = index.cpu()[kept]
        for row, name in enumerate(self.names, start=_FIRST_SCORE):
            if scores[name].shape != index.shape:
                raise ValueError(f"expected {name!r} of {len(index)} samples, got shape {tuple(scores[name].shape)}.")
            self._table[row, places] = scores[name].detach().cpu().double()[kept]
        self._table[_SEEN, places] = 1.0

    def state(self) -> Tensor:
        """Everything, as one tensor of doubles to be summed over processes; zero where nothing was seen."""
        return self._table.flatten().clone()

    def load(self, state: Tensor) -> None:
        """Take over the sum of several states."""
        summed = state.cpu().view_as(self._table)
        self._table = summed / summed[_SEEN].clamp_min(1)

    @property
    def n(self) -> int:
        """How many samples were measured."""
        return int(self._table[_SEEN].sum())

    def of(self, name: str) -> Tensor:
        """One score of the measured samples in the order of their indices, ``(n,)``, double precision."""
        return self._table[_FIRST_SCORE + self.names.index(name), self._table[_SEEN] > 0]
