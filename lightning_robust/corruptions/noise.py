"""Noise, each value by itself.

All take pictures ``(N, C, H, W)`` in [0, 1], float32 or float64, the parameters of one severity (:data:`TABLES`) and
one generator a picture, and return pictures of the same kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from lightning_robust.corruptions.tables import Parameters
from lightning_robust.randomness import normal, uniform

__all__ = ["gaussian_noise", "impulse_noise", "shot_noise", "speckle_noise"]


def gaussian_noise(x: Tensor, parameters: Parameters, generators: Sequence[Generator]) -> Tensor:
    """Poor light: ``x + sigma * normal``. Parameters: ``(sigma,)``."""
    (sigma,) = parameters
    return (x + sigma * normal(x, generators)).clamp(0, 1)


def shot_noise(x: Tensor, parameters: Parameters, generators: Sequence[Generator]) -> Tensor:
    """Few photons: a Poisson number of them for each value. Parameters: ``(photons of a white pixel,)``."""
    (photons,) = parameters
    rates = photons * x
    pairs = zip(rates, generators, strict=True)
    counts = torch.stack([torch.poisson(rate.to(g.device), generator=g) for rate, g in pairs])
    return (counts.to(x.device) / photons).clamp(0, 1)


def impulse_noise(x: Tensor, parameters: Parameters, generators: Sequence[Generator]) -> Tensor:
    """Dead sensors: some values become 0 or 1, either as likely. Parameters: ``(share of values,)``."""
    (share,) = parameters
    draw = uniform(x, generators)
    return x.masked_fill(draw < share / 2, 0.0).masked_fill(draw >= 1 - share / 2, 1.0)


def speckle_noise(x: Tensor, parameters: Parameters, generators: Sequence[Generator]) -> Tensor:
    """Noise that grows with the signal: ``x + sigma * x * normal``. Parameters: ``(sigma,)``."""
    (sigma,) = parameters
    return (x + sigma * x * normal(x, generators)).clamp(0, 1)
