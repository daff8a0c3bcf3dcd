"""Scores of any number of samples in memory of fixed size: counts at the 65,536 levels of a short float."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_robust.ood.separation import separation_of_counts

__all__ = ["LEVELS", "StreamedScores", "ordered_keys", "separation_streamed"]

LEVELS = 1 << 16
LARGEST = float(torch.finfo(torch.float32).max)
ZERO = LEVELS // 2  # the level of a score of 0

# Magnitudes, as the bits of a float32 (eight of exponent, 23 below), where levels begin to have another width: 0,
# 2**-40, 2**-7, 2**15, 2**40, infinity. In between there are 16, 128, 1024, 128 and 16 levels to each power of two.
TURNS = np.array([0, 127 - 40, 127 - 7, 127 + 15, 127 + 40, 255]) << 23
CUT = np.array([19, 16, 13, 16, 19])  # bits that are cut off
TURN_LEVELS = np.cumsum([0, *(np.diff(TURNS) >> CUT)])


def ordered_keys(scores: Tensor) -> Tensor:
    """The level of each score, ``(N,)`` int64 in [0, 65536); a higher score never has a lower level.

    The bits of a positive float32 are ordered as integers are; their lower ones are cut off, towards zero. Levels are
    0.05 to 0.1 % of the score wide from 2**-7 to 2**15, where most scores lie, 0.4 to 0.8 % from 2**-40 to 2**40, and 3
    to 6 % beyond. Negative scores mirror positive ones; zero and minus zero share a level, infinities have one each.
    Halves are raised to float32, doubles rounded to it.

    Args:
        scores: ``(N,)``, without NaN, which has no place in an order.

    Example:
        >>> ordered_keys(torch.tensor([-2.0, -1.0, 0.0, 1.0, 1.0005, 1.001, torch.inf])).tolist()
        [18959, 19983, 32768, 45552, 45552, 45553, 65520]
    """
    values = scores.detach().float()
    bits = values.abs().view(torch.int32).long()
    level = torch.zeros_like(bits)
    for low, high, cut in zip(TURNS.tolist(), TURNS[1:].tolist(), CUT.tolist(), strict=False):
        level += bits.clamp(low, high) - low >> cut
    return torch.where(values < 0, ZERO - 1 - level, ZERO + level)


def places(scores: Tensor) -> Tensor:
    """Where each score is counted, ``(N,)``: at its level, or behind all levels if it is NaN or infinite."""
    values = scores.detach()
    finite = values.isfinite()
    # A finite double may round to an infinite float32.
    values = values.clamp(-LARGEST, LARGEST) if values.dtype == torch.float64 else values
    return ordered_keys(values.nan_to_num()).where(finite, LEVELS)


def _edge(keys: np.ndarray) -> np.ndarray:
    """The lower edge of each level, which is the upper edge of the one below, as doubles; at most infinity."""
    bits = np.interp(abs(keys - ZERO), TURN_LEVELS, TURNS).astype(np.int32)
    edges: np.ndarray = np.sign(keys - ZERO) * bits.view(np.float32).astype(np.float64)
    return edges


@dataclass(frozen=True, eq=False)
class StreamedScores:
    """How many scores there were at each level of :func:`ordered_keys`.

    Counts add up: the order of samples, the batches and the number of processes mean nothing. Half a mebibyte, whatever
    the number of scores.

    Attributes:
        counts: ``(65536,)`` int64, the lowest level first.
        invalid: Scores that were NaN or infinite; they are counted here only.

    Example:
        >>> streamed = StreamedScores.of(torch.tensor([1.0, 2.0])) + StreamedScores.of(torch.tensor([3.0, torch.nan]))
        >>> streamed.n, streamed.invalid
        (3, 1)
    """

    counts: Tensor
    invalid: int

    @classmethod
    def zero(cls) -> StreamedScores:
        """Nothing counted yet."""
        return cls(torch.zeros(LEVELS, dtype=torch.int64), 0)

    @classmethod
    def of(cls, scores: Tensor) -> StreamedScores:
        """Count scores ``(N,)``.

        Raises:
            ValueError: If they have another shape.
        """
        if scores.ndim != 1:
            raise ValueError(f"expected scores (N,), got {tuple(scores.shape)}.")
        counts = torch.bincount(places(scores).cpu(), minlength=LEVELS + 1)
        return cls(counts[:-1].clone(), int(counts[-1]))

    def __add__(self, other: StreamedScores) -> StreamedScores:
        return StreamedScores(self.counts + other.counts, self.invalid + other.invalid)

    def state(self) -> Tensor:
        """Everything, ``(65537,)`` doubles to be summed over processes; counts stay exact up to 2**53."""
        return torch.cat([self.counts, torch.tensor([self.invalid])]).double()

    @classmethod
    def load(cls, state: Tensor) -> StreamedScores:
        """The counts that :meth:`state` wrote, or several of them added.

        Raises:
            ValueError: If the length is not that of a state.
        """
        if state.shape != (LEVELS + 1,):
            raise ValueError(f"expected a state of {LEVELS + 1} numbers, got {tuple(state.shape)}.")
        numbers = state.detach().cpu().long()
        return cls(numbers[:-1].clone(), int(numbers[-1]))

    @property
    def n(self) -> int:
        """How many scores were counted, without the invalid ones."""
        return int(self.counts.sum())

    def quantile(self, q: float) -> float:
        """The upper edge of the first level with at least the share ``q`` at it or below; NaN if nothing was counted.

        ``score <= quantile(0.95)`` accepts at least 95 % of what was counted; ``quantile(0)`` is that of the lowest
        level with scores.

        Raises:
            ValueError: If ``q`` is not in [0, 1].
        """
        if not 0 <= q <= 1:
            raise ValueError(f"expected a share in [0, 1], got {q}; 0.95 accepts 95 %.")
        if not self.n:
            return math.nan
        wanted = max(1, math.ceil(q * self.n - 1e-9))  # a product may come out a little above the whole number meant
        key = int(torch.searchsorted(self.counts.cumsum(0), wanted))
        return float(_edge(np.array([key + 1]))[0])

    def to_histogram(self, edges: Tensor) -> Tensor:
        """How many scores lie in each bin, ``(B,)`` doubles, for a picture or a checkpoint.

        A level that an edge cuts is shared out, as if its scores were spread evenly: counts need not be whole. What
        lies beyond the edges is counted in the first and in the last bin, so that they sum to :attr:`n`.

        Args:
            edges: Where bins begin and end, ``(B + 1,)``, finite and increasing.

        Raises:
            ValueError: If the edges do not increase.

        Example:
            >>> StreamedScores.of(torch.tensor([-9.0, 0.5, 0.5, 2.5])).to_histogram(torch.tensor([0.0, 1.0, 2.0, 3.0]))
            tensor([3., 0., 1.], dtype=torch.float64)
        """
        ends = edges.detach().cpu().double().numpy()
        if ends.ndim != 1 or len(ends) < 2 or not np.isfinite(ends).all() or not (np.diff(ends) > 0).all():
            raise ValueError(f"expected finite, increasing edges (B + 1,), got {ends.shape}: {ends[:10]}.")
        keys = np.flatnonzero(self.counts.numpy())
        reached = np.zeros(len(ends))
        if len(keys):
            # The cumulative count is a straight line across each level with scores, and flat in between.
            counts = self.counts.numpy()[keys]
            across = np.stack([_edge(keys), _edge(keys + 1)], axis=1).clip(-LARGEST, LARGEST)
            below = np.stack([counts.cumsum() - counts, counts.cumsum()], axis=1)
            reached = np.interp(ends, across.ravel(), below.ravel())
        reached[0], reached[-1] = 0, self.n
        return torch.from_numpy(np.diff(reached))


def separation_streamed(s_in: StreamedScores, s_out: StreamedScores) -> dict[str, float]:
    """What :func:`~lightning_robust.ood.separation` finds, of counted scores.

    Scores at one level are a tie, which moves the AUROC by at most half the share of pairs that are at one level:
    mostly by less than 1e-5. Where all scores lie within 1 % of a number that is not 0 (1000 to 1010), few levels are
    left to tell them apart, and the exact function is needed.

    Raises:
        ValueError: If a side has no scores.

    Example:
        >>> near, far = StreamedScores.of(torch.tensor([0.1, 0.2, 0.6])), StreamedScores.of(torch.tensor([0.5, 0.9]))
        >>> found = separation_streamed(near, far)
        >>> round(found["auroc"], 3), found["fpr95_ood_positive"]
        (0.833, 0.3333333333333333)
    """
    for side, scores in (("s_in", s_in), ("s_out", s_out)):
        if not scores.n:
            raise ValueError(
                f"expected at least one finite score in {side}, got none and {scores.invalid} invalid ones."
            )
    return separation_of_counts(s_in.counts, s_out.counts)
