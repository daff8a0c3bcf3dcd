"""Blurs: of the lens, of a moving camera, of a zoom, of frosted glass.

All take pictures ``(N, C, H, W)`` in [0, 1], float32 or float64, the parameters of one severity (:data:`TABLES`) and
one generator a picture, and return pictures of the same kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from lightning_robust.corruptions.filters import blurred, convolved, smeared, zoomed
from lightning_robust.corruptions.tables import Parameters
from lightning_robust.randomness import uniform

__all__ = ["defocus_blur", "gaussian_blur", "glass_blur", "motion_blur", "zoom_blur"]


def gaussian_blur(x: Tensor, parameters: Parameters, generators: Sequence[Generator]) -> Tensor:
    """A Gaussian filter. Parameters: ``(sigma,)`` in pixels."""
    (sigma,) = parameters
    return blurred(x, sigma).clamp(0, 1)


def defocus_blur(x: Tensor, parameters: Parameters, generators: Sequence[Generator]) -> Tensor:
    """A lens out of focus: a disc with softened edge. Parameters: ``(radius, sigma of the edge)`` in pixels."""
    radius, softness = parameters
    return convolved(x, _disc(radius, softness)).clamp(0, 1)


def motion_blur(x: Tensor, parameters: Parameters, generators: Sequence[Generator]) -> Tensor:
    """A moving camera, in a random direction within 45 degrees of the horizon.

    Half a Gaussian along the line, as in ImageMagick. Parameters: ``(radius, sigma)`` in pixels; the line is twice the
    radius long.
    """
    radius, sigma = parameters
    turn = uniform(x.new_empty(len(x), 1), generators)
    return smeared(x, radius, sigma, (90 * turn - 45).flatten().tolist()).clamp(0, 1)


def zoom_blur(x: Tensor, parameters: Parameters, generators: Sequence[Generator]) -> Tensor:
    """A camera that moves towards its object: the mean of the picture and of its enlargements.

    Parameters: ``(count, step)``; factors of enlargement are 1, 1 + step, ..., 1 + (count - 1) * step.
    """
    count, step = parameters
    total = x.clone()
    for i in range(int(count)):
        total += zoomed(x, 1 + i * step)
    return (total / (count + 1)).clamp(0, 1)


def glass_blur(x: Tensor, parameters: Parameters, generators: Sequence[Generator]) -> Tensor:
    """Frosted glass: pixels change places with neighbours, between two Gaussian blurs.

    Parameters: ``(sigma, reach, rounds)``; partners are ``-reach`` to ``reach - 1`` pixels away in both directions. In
    each round every pixel that has room changes places once on its own account. Those whose partners cannot collide do
    so at once: the order is another than in the original, which goes through the pixels row by row.
    """
    sigma, reach, rounds = parameters[0], int(parameters[1]), int(parameters[2])
    soft = blurred(x, sigma)
    n, _, height, width = x.shape
    place = torch.arange(height * width, device=x.device).view(height, width)
    source = place.flatten().expand(n, -1).clone()
    for _ in range(rounds):
        draws = uniform(x.new_empty(n, 2, height, width), generators)
        down, right = ((2 * reach * draws).long() - reach).unbind(1)
        partner = (place + width * down + right).flatten(1)
        for top in range(reach, 3 * reach):
            for left in range(reach, 3 * reach):
                here = place[top : height - reach : 2 * reach, left : width - reach : 2 * reach].flatten()
                there = partner[:, here]
                ours, theirs = source[:, here], source.gather(1, there)
                source[:, here] = theirs
                source.scatter_(1, there, ours)
    shuffled = soft.flatten(2).gather(2, source.unsqueeze(1).expand(-1, x.shape[1], -1)).view_as(x)
    return blurred(shuffled, sigma).clamp(0, 1)


def _disc(radius: float, softness: float) -> Tensor:
    """A disc ``(K, K)`` of ones, softened by a small Gaussian kernel, of sum 1; double precision."""
    margin = 1 if radius <= 8 else 2  # how far the kernel that softens it reaches
    reach = math.floor(radius) + margin
    steps = torch.arange(-reach, reach + 1, dtype=torch.float64)
    disc = (steps[:, None] ** 2 + steps**2 <= radius**2).double()
    taps = torch.arange(-margin, margin + 1, dtype=torch.float64)
    edge = (-0.5 * (taps / softness) ** 2).exp()
    kernel = torch.nn.functional.conv2d(disc[None, None], edge.outer(edge)[None, None], padding=margin)[0, 0]
    return kernel / kernel.sum()
