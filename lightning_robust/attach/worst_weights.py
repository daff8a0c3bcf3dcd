"""A step that runs at the worst weights near by: adversarial weight perturbation, over all processes alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.attacks.search import HALF_SCALE
from lightning_robust.attacks.weights import moved, perturbable, worst_direction

__all__ = ["at_worst_weights", "steepest_weights"]


def steepest_weights(loss: Tensor, module: nn.Module, trainer: Any) -> list[Tensor]:
    """The gradient of a loss by each weight that is perturbed, summed over processes."""
    weights = perturbable(module)
    gradients = torch.autograd.grad(loss * HALF_SCALE, weights, allow_unused=True)
    filled = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
    if trainer.world_size == 1:
        return filled
    return [trainer.strategy.reduce(gradient, reduce_op="sum") for gradient in filled]


@contextmanager
def at_worst_weights(module: nn.Module, gradients: list[Tensor], gamma: float) -> Iterator[None]:
    """Inside, weights are ``gamma`` of their length up the gradient; afterwards they are what they were."""
    weights = perturbable(module)
    with moved(weights, worst_direction(weights, gradients, gamma)):
        yield
