"""How sure a share is that was counted on so many samples."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["share_interval", "wilson"]

NORMAL_95 = 1.96


def wilson(share: float, n: float) -> tuple[float, float]:
    """The 95 % interval of a share that was counted on ``n`` samples (Wilson, 1927); it has a width at 0 and 1 too.

    Example:
        >>> [round(end, 3) for end in wilson(0.9, 500)]
        [0.871, 0.923]
    """
    z = NORMAL_95**2 / n
    half = NORMAL_95 * math.sqrt(share * (1 - share) / n + z / (4 * n))
    return (share + z / 2 - half) / (1 + z), (share + z / 2 + half) / (1 + z)


def share_interval(right: Tensor) -> tuple[float, float]:
    """The 95 % interval of the mean of ``right`` ``(N,)``, each in [0, 1].

    Wilson's where every sample is right or wrong; for shares (of labels, of pixels) that of a normal mean, cut to
    [0, 1]. Samples are taken to be independent.

    Raises:
        ValueError: If there are no samples.
    """
    n = len(right)
    if not n:
        raise ValueError("an interval needs at least one sample, got none.")
    share = float(right.double().mean())
    if bool(((right == 0) | (right == 1)).all()) or n < 2:
        return wilson(share, n)
    half = NORMAL_95 * float(right.double().std()) / math.sqrt(n)
    return max(0.0, share - half), min(1.0, share + half)
