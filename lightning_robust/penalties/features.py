"""What counts as one feature of an input, how far features range, and which of them a mask marks."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["channels_of", "ranges", "spread"]


def channels_of(x: Tensor, channel_dim: int | None) -> int | None:
    """The dimension of ``x`` whose entries belong to one feature (the colours of a pixel); None where there is none.

    Args:
        x: Inputs ``(N, ...)``; tables and signals ``(N, D)`` have no such dimension.
        channel_dim: The dimension, counted from the end if negative; None for none.

    Raises:
        ValueError: If ``x`` has no such dimension, or it is that of the samples.

    Example:
        >>> images, sequences, table = torch.zeros(2, 3, 8, 8), torch.zeros(2, 5, 3), torch.zeros(2, 4)
        >>> channels_of(images, 1), channels_of(sequences, -1), channels_of(table, 1)
        (1, 2, None)
    """
    if channel_dim is None or x.ndim < 3:
        return None
    dim = channel_dim + x.ndim if channel_dim < 0 else channel_dim
    if not 0 < dim < x.ndim:
        raise ValueError(
            f"channel_dim={channel_dim} is no dimension of features in inputs {tuple(x.shape)}: expected 1 to "
            f"{x.ndim - 1} (0 counts samples), or None where each number is a feature of its own."
        )
    return dim


def ranges(x: Tensor, channel_dim: int | None) -> tuple[Tensor, Tensor]:
    """Lowest and highest value that features take, of shapes that broadcast with ``x``.

    Of an image or a signal with channels those of each of its own channels; of tables ``(N, D)``, whose columns have
    units of their own, those of each column in the batch.

    Example:
        >>> [end.tolist() for end in ranges(torch.tensor([[1.0, 50.0], [2.0, 10.0]]), 1)]
        [[[1.0, 10.0]], [[2.0, 50.0]]]
    """
    if x.ndim < 3:
        return x.amin(0, keepdim=True), x.amax(0, keepdim=True)
    channels = channels_of(x, channel_dim)
    dims = [dim for dim in range(1, x.ndim) if dim != channels]
    return x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)


def spread(mask: Tensor, x: Tensor) -> Tensor:
    """A mask as numbers shaped like ``x``, float32 or more.

    Args:
        mask: In [0, 1], of any type. The shape of ``x``, 1 instead of any size (the batch's too), or without the
            dimension of channels: ``(N, 1, H, W)`` and ``(N, H, W)`` both fit images ``(N, C, H, W)``; ``(N, T)`` fits
            sequences ``(N, T, F)`` and signals ``(N, C, T)``, whichever has that size.
        x: Inputs ``(N, ...)``.

    Raises:
        ValueError: If there is no mask, it does not fit ``x``, fits in two ways, or holds NaN or values outside [0, 1].

    Example:
        >>> spread(torch.tensor([[1, 0]]), torch.zeros(1, 2, 3))  # two points in time, three features
        tensor([[[1., 1., 1.],
                 [0., 0., 0.]]])
    """
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"expected a mask, a tensor in [0, 1] that fits inputs {tuple(x.shape)}, got {type(mask).__name__}; where "
            "nothing is marked it holds zeros."
        )
    shaped = mask.detach().to(x.device, torch.promote_types(x.dtype, torch.float32))
    if shaped.ndim == x.ndim - 1:
        shaped = shaped.unsqueeze(_missing(shaped, x))
    if shaped.ndim != x.ndim or any(m not in (1, n) for m, n in zip(shaped.shape, x.shape, strict=True)):
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} does not fit inputs {tuple(x.shape)}; expected that shape, 1 instead "
            "of any size, or no dimension of channels: (N, 1, H, W) or (N, H, W) for images (N, C, H, W), (N, T) for "
            "sequences (N, T, F)."
        )
    low, high = (float(bound) for bound in shaped.aminmax())
    if not (low >= 0 and high <= 1):  # so that NaN is caught too
        raise ValueError(
            f"a mask must lie in [0, 1] (1 where the input must not matter), got values from {low:g} to {high:g}; "
            "divide a mask stored as 0..255 by 255, and fill in missing values."
        )
    return shaped.expand_as(x)


def _missing(mask: Tensor, x: Tensor) -> int:
    """Which dimension of ``x`` a mask lacks: that of channels, 1, or the last one of sequences ``(N, T, F)``.

    Raises:
        ValueError: If it may be either.
    """
    if x.ndim != 3 or mask.shape[1] == 1 or mask.shape[1] != x.shape[1]:
        return 1
    if x.shape[1] == x.shape[2]:
        n, length = mask.shape
        raise ValueError(
            f"a mask of shape ({n}, {length}) fits inputs {tuple(x.shape)} in two ways: make it ({n}, 1, {length}) "
            f"where it marks places of channels-first signals, or ({n}, {length}, 1) where it marks points in time of "
            "sequences (N, T, F)."
        )
    return 2
