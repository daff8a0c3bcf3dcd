"""How far a picture is from another, in decibels."""

from __future__ import annotations

from torch import Tensor

__all__ = ["psnr"]


def psnr(x: Tensor, reference: Tensor) -> Tensor:
    r"""The peak signal-to-noise ratio of each picture, ``(N,)`` in dB: :math:`-10 \log_{10}` of the mean squared error.

    Args:
        x: Pictures ``(N, ...)`` in [0, 1].
        reference: Pictures of the same shape.

    Returns:
        Double precision; infinite where both are equal.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> psnr(torch.full((1, 1, 2, 2), 0.6), torch.full((1, 1, 2, 2), 0.5))
        tensor([20.0000], dtype=torch.float64)
    """
    if x.shape != reference.shape or x.ndim < 2:
        raise ValueError(
            f"expected two batches of pictures of one shape (N, ...), got {tuple(x.shape)} and "
            f"{tuple(reference.shape)}."
        )
    return -10 * (x.double() - reference.double()).square().flatten(1).mean(1).log10()
