"""Rows of features as detectors take them: checked, without those that are no numbers, in double precision."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Summed", "TrainingRows", "agreed", "in_double", "scores_of"]

Summed = Callable[[Tensor], Tensor]
"""Sums a tensor of doubles on the CPU over processes; every process calls it equally often."""

WIDEST = 8192  # features; their second moments take 512 MB then, and grow with the square


class TrainingRows:
    """Checks what a detector is given to learn from, and counts what it must not learn from.

    Attributes:
        sizes: Numbers of features and of classes ``(D, K)``; ``None`` before the first batch.
        lost: Rows that were left out because a feature, or the largest logit, is NaN or infinite.

    Example:
        >>> rows = TrainingRows()
        >>> features, logits, labels, index = rows(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2), torch.arange(2))
        >>> rows.sizes, rows.lost
        ((3, 4), 0)
    """

    def __init__(self) -> None:
        self.sizes: tuple[int, int] | None = None
        self.lost = 0

    def __call__(
        self, features: Tensor, logits: Tensor, labels: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same rows without graphs and without lost ones; features and logits where they are, the rest on the CPU.

        Raises:
            ValueError: If shapes do not fit, or not those of earlier batches.
        """
        n = len(features)
        if (
            features.ndim != 2
            or logits.ndim != 2
            or len(logits) != n
            or labels.shape[:1] != (n,)
            or index.shape != (n,)
        ):
            raise ValueError(
                "expected features (N, D), logits (N, K), labels (N,) and sample numbers (N,), got "
                f"{tuple(features.shape)}, {tuple(logits.shape)}, {tuple(labels.shape)} and {tuple(index.shape)}; "
                "average features over places first."
            )
        sizes = (features.shape[1], logits.shape[1])
        if self.sizes not in (None, sizes):
            raise ValueError(f"expected (features, classes) = {self.sizes} as in earlier batches, got {sizes}.")
        if not 0 < sizes[0] <= WIDEST:
            raise ValueError(f"expected 1 to {WIDEST} features, got {sizes[0]}; average them over places.")
        self.sizes = sizes
        rows = features.detach(), logits.detach(), labels.detach().cpu(), index.detach().cpu()
        if not n:
            return rows
        finite = (rows[0].isfinite().all(1) & rows[1].amax(1).isfinite().to(features.device)).cpu()
        lost = n - int(finite.sum())
        if not lost:
            return rows
        if not self.lost:  # once is enough: a network that yields NaN does so in batch after batch
            warnings.warn(
                f"{lost} of {n} training rows have NaN or infinite features or logits; such rows are left out.",
                stacklevel=3,
            )
        self.lost += lost
        kept_features, kept_logits, kept_labels, kept_index = (row[finite.to(row.device)] for row in rows)
        return kept_features, kept_logits, kept_labels, kept_index


def agreed(sizes: Sequence[int] | None, summed: Summed) -> tuple[int, ...]:
    """The sizes that all processes with samples have, for one without samples to know.

    Args:
        sizes: Of this process; ``None`` if it has none to tell.
        summed: Sums over processes; called twice.

    Returns:
        The sizes; empty if no process has any.

    Raises:
        ValueError: In every process alike, if they differ.

    Example:
        >>> agreed((512, 10), lambda own: 3 * own)  # three processes alike
        (512, 10)
    """
    length = summed(torch.tensor([sizes is not None, len(sizes or ())], dtype=torch.float64))
    processes = int(length[0])
    if not processes:
        summed(torch.zeros(0, dtype=torch.float64))  # as often as elsewhere
        return ()
    count = int(length[1]) // processes
    own = torch.tensor(sizes or [0] * count, dtype=torch.float64)
    total, squares = summed(torch.stack([own, own.square()]))
    # Equal numbers, and no others, have as much in squares as their sum has (Cauchy and Schwarz).
    if bool((processes * squares != total.square()).any()):
        raise ValueError(
            f"expected the same sizes in all processes, got {tuple(sizes or ())} in this one and "
            f"{(total / processes).tolist()} on average; every process must read the same layer."
        )
    return tuple(int(size) for size in total / processes)


def in_double(x: Tensor) -> Tensor:
    """``x`` in double precision where it is, or on the CPU if its device has no doubles."""
    x = x.detach()
    return (x.cpu() if x.device.type == "mps" else x).double()


def scores_of(features: Tensor, width: int, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Scores of rows, NaN for those whose features are not finite.

    Args:
        features: ``(N, D)``.
        width: The D that was learned from.
        score: Doubles ``(N, D)`` to ``(N,)``.

    Raises:
        ValueError: If the shape is another.

    Example:
        >>> scores_of(torch.tensor([[1.0, 2.0], [torch.inf, 0.0]]), 2, lambda x: x.sum(1))
        tensor([3., nan], dtype=torch.float64)
    """
    if features.ndim != 2 or features.shape[1] != width:
        raise ValueError(f"expected features (N, {width}) as learned from, got {tuple(features.shape)}.")
    x = in_double(features)
    return score(x).masked_fill(~x.isfinite().all(1), math.nan)
