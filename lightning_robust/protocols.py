"""The call signatures, with shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from lightning_robust.randomness import Noise

__all__ = ["Attack", "LogitsFn", "Objective"]

LogitsFn = Callable[[Tensor], Tensor]
"""Inputs ``(N, ...)`` to logits ``(N, K)``, differentiable."""


class Attack(Protocol):
    """How inputs are perturbed. Settings only: an attack remembers nothing between calls."""

    def __call__(self, logits_fn: LogitsFn, x: Tensor, y: Tensor, *, generator: Noise = None) -> Tensor:
        """Inputs ``x`` ``(N, ...)`` with targets ``y`` to perturbed inputs of the same shape and type."""


class Objective(Protocol):
    """What an attack climbs, one number a sample."""

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        """Logits and targets to ``(N,)``; higher is worse for the model."""
