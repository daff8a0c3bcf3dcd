"""Several scores of any number of samples, in counts of fixed size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_robust.ood.streaming import StreamedScores

__all__ = ["StreamedTable"]


class StreamedTable:
    """How often each score took which value, to 16 bits: half a MiB a score, whatever the number of samples.

    It takes the place of a :class:`~lightning_robust.metrics.ScoreTable` where there are too many samples to keep.

    Args:
        names: Names of the scores.

    Example:
        >>> table = StreamedTable(["energy"])
        >>> table.add(torch.arange(3), {"energy": torch.tensor([-1.0, -5.0, 0.0])})
        >>> table.n, table.of("energy").n
        (3, 3)
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._scores = {name: StreamedScores.zero() for name in self.names}

    def add(self, index: Tensor, scores: Mapping[str, Tensor]) -> None:
        """Scores ``(N,)`` of one batch; ``index`` is not kept.

        Raises:
            ValueError: If a score is missing, is not one of the names, or has another shape than the indices.
        """
        if set(scores) != set(self.names):
            raise ValueError(f"expected the scores {sorted(self.names)}, got {sorted(scores)}.")
        for name in self.names:
            if scores[name].shape != index.shape:
                raise ValueError(f"expected {name!r} of {len(index)} samples, got shape {tuple(scores[name].shape)}.")
            self._scores[name] = self._scores[name] + StreamedScores.of(scores[name].detach().cpu())

    def state(self) -> Tensor:
        """Everything, as one tensor of doubles to be summed over processes."""
        return torch.cat([scores.state() for scores in self._scores.values()])

    def load(self, state: Tensor) -> None:
        """Take over the sum of several states."""
        parts = state.cpu().chunk(len(self.names))
        self._scores = {name: StreamedScores.load(part) for name, part in zip(self.names, parts, strict=True)}

    @property
    def n(self) -> int:
        """How many samples were counted, with those whose scores are not finite."""
        first = self._scores[self.names[0]]
        return first.n + first.invalid

    def of(self, name: str) -> StreamedScores:
        """The counts of one score."""
        return self._scores[name]
