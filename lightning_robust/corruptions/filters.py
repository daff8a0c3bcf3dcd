"""Linear filters for batches of pictures, whose result for one picture does not depend on the others by a single bit.

Beyond its border a picture goes on as its mirror image, where nothing else is said. Matrix products, Fourier transforms
and interpolations are taken picture by picture: libraries choose the order of their sums by the size of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["blurred", "convolved", "gaussian_matrix", "mirrored", "separable", "smeared", "zoomed"]


def mirrored(positions: Tensor, side: int) -> Tensor:
    """Positions along an endless line to those in ``[0, side)`` that a mirror at both ends shows there.

    Example:
        >>> mirrored(torch.arange(-2, 6), 3)
        tensor([1, 0, 0, 1, 2, 2, 1, 0])
    """
    within = positions.remainder(2 * side)
    return torch.minimum(within, 2 * side - 1 - within)


def gaussian_matrix(side: int, sigma: float, truncate: float = 4.0) -> Tensor:
    """The Gaussian filter of a line as a matrix ``(side, side)``, double precision on the CPU; each row sums to 1.

    Args:
        side: Length of the line, in pixels.
        sigma: Standard deviation, in pixels; 0 changes nothing.
        truncate: Where the kernel ends, in standard deviations.

    Example:
        >>> (100 * gaussian_matrix(3, 0.5)).round().int()
        tensor([[89, 11,  0],
                [11, 79, 11],
                [ 0, 11, 89]], dtype=torch.int32)
    """
    reach = int(truncate * sigma + 0.5)
    matrix = torch.zeros(side, side, dtype=torch.float64)
    if not reach:
        return matrix.fill_diagonal_(1)
    steps = torch.arange(-reach, reach + 1)
    weights = (-0.5 * (steps / sigma).double() ** 2).exp()
    places = mirrored(torch.arange(side)[:, None] + steps, side)
    return matrix.scatter_add_(1, places, (weights / weights.sum()).expand(side, -1))


def blurred(x: Tensor, sigma: float, truncate: float = 4.0) -> Tensor:
    """Pictures ``(N, C, H, W)`` under a Gaussian filter of ``sigma`` pixels."""
    return separable(x, gaussian_matrix(x.shape[2], sigma, truncate), gaussian_matrix(x.shape[3], sigma, truncate))


def separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``rows @ picture @ columns.T`` for each channel of ``x`` ``(N, C, H, W)``, with square matrices of its sides."""
    rows, columns = rows.to(x), columns.to(x).T
    return torch.stack([rows @ picture @ columns for picture in x])


def convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """Pictures ``(N, C, H, W)`` under one kernel ``(K, K)``, K odd; by Fourier transforms, large kernels cost no more.

    The kernel is not turned around, as is the custom in networks: its right half weighs what lies to the right.

    Example:
        >>> convolved(torch.eye(3)[None, None], torch.tensor([[0.0, 0, 0], [0, 0, 1], [0, 0, 0]]))[0, 0].round().abs()
        tensor([[0., 0., 0.],
                [1., 0., 0.],
                [0., 1., 1.]])
    """
    height, width = x.shape[2:]
    reach = len(kernel) // 2
    padded = _padded(x, reach)
    # What wraps around the edge stays within the padding, which is cut off.
    sides = [_fast(side) for side in padded.shape[2:]]
    response = torch.fft.rfft2(kernel.flip(0, 1).to(x), s=sides)
    made = [torch.fft.irfft2(torch.fft.rfft2(picture, s=sides) * response, s=sides) for picture in padded]
    return torch.stack(made)[:, :, 2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]


def smeared(x: Tensor, radius: float, sigma: float, angles: Sequence[float]) -> Tensor:
    """Each picture of ``x`` ``(N, C, H, W)`` dragged along a line: half a Gaussian, on one side of every pixel only.

    Beyond its border a picture goes on as its last pixel.

    Args:
        x: Pictures.
        radius: The line is ``2 * radius + 1`` pixels long.
        sigma: Standard deviation along the line, in pixels.
        angles: One a picture, in degrees; 0 drags along the rows.
    """
    height, width = x.shape[2:]
    length = int(2 * radius + 1)
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(length)]
    total = sum(weights)
    # Pixels at the border leave streaks, as in ImageMagick: a mirror image would make snow too even.
    padded = F.pad(x, [length] * 4, mode="replicate")
    made = torch.zeros_like(x)
    for one, picture, angle in zip(made, padded, angles, strict=True):
        down, right = math.sin(math.radians(angle)), math.cos(math.radians(angle))
        for i, weight in enumerate(weights):
            top, left = length + math.floor(i * down + 0.5), length + math.floor(i * right + 0.5)
            one.add_(picture[:, top : top + height, left : left + width], alpha=weight / total)
    return made


def zoomed(x: Tensor, factor: float) -> Tensor:
    """The middle of each picture ``(N, C, H, W)``, enlarged to its full size.

    Example:
        >>> zoomed(torch.arange(16.0).view(1, 1, 4, 4), 2.0)[0, 0]
        tensor([[ 5.0000,  5.3333,  5.6667,  6.0000],
                [ 6.3333,  6.6667,  7.0000,  7.3333],
                [ 7.6667,  8.0000,  8.3333,  8.6667],
                [ 9.0000,  9.3333,  9.6667, 10.0000]])
    """
    height, width = x.shape[2:]
    tall, wide = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - tall) // 2, (width - wide) // 2
    middle = x[:, :, top : top + tall, left : left + wide].contiguous()
    sides = round(tall * factor), round(wide * factor)
    top, left = (sides[0] - height) // 2, (sides[1] - width) // 2
    large = [F.interpolate(one[None], sides, mode="bilinear", align_corners=True)[0] for one in middle]
    return torch.stack([one[:, top : top + height, left : left + width] for one in large])


def _padded(x: Tensor, margin: int) -> Tensor:
    rows, columns = (
        mirrored(torch.arange(-margin, side + margin, device=x.device), side) for side in (x.shape[2], x.shape[3])
    )
    return x[:, :, rows][:, :, :, columns]


def _fast(side: int) -> int:
    """The next size that a Fourier transform likes: no prime factor above 5."""
    while True:
        rest = side
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return side
        side += 1
