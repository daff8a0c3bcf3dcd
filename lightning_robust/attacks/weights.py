"""Adversarial weight perturbation: the loss is made flat not only in the inputs, but in the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["moved", "perturbable", "worst_direction"]


def perturbable(module: nn.Module) -> list[nn.Parameter]:
    """The weights that are perturbed: matrices and kernels; biases and normalisation layers stay as they are.

    Example:
        >>> len(perturbable(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))))
        1
    """
    return [parameter for parameter in module.parameters() if parameter.requires_grad and parameter.ndim > 1]


def worst_direction(weights: Sequence[Tensor], gradients: Sequence[Tensor | None], gamma: float) -> list[Tensor]:
    r"""A step up the loss for each layer, as long as ``gamma`` times its weights.

    .. math:: v_l = \gamma \, \|w_l\| \, \frac{g_l}{\|g_l\|}

    Args:
        weights: One tensor a layer.
        gradients: Of the loss by each of them; None where it does not depend on a layer.
        gamma: Length of the step relative to the layer's weights, 0.005 to 0.01 as published.

    Example:
        >>> worst_direction([torch.tensor([[3.0, 4.0]])], [torch.tensor([[0.0, 2.0]])], gamma=0.1)
        [tensor([[0.0000, 0.5000]])]

    References:
        Wu et al., `Adversarial Weight Perturbation Helps Robust Generalization <https://arxiv.org/abs/2004.05884>`_,
        2020, equations 8 and 10.
    """
    steps = []
    for weight, gradient in zip(weights, gradients, strict=True):
        if gradient is None:
            steps.append(torch.zeros_like(weight))
            continue
        length = gradient.norm().clamp_min(torch.finfo(gradient.dtype).tiny)
        steps.append((gamma * weight.detach().norm() / length * gradient).to(weight.dtype))
    return steps


@contextmanager
def moved(weights: Sequence[nn.Parameter], steps: Sequence[Tensor]) -> Iterator[None]:
    """Inside, every weight is moved by its step; afterwards it is what it was, to the last bit, whatever happens.

    The originals are put aside, not computed back: subtracting a step does not give the same floats. They must be put
    back after the backward pass, not before it.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> before = layer.weight.detach().clone()
        >>> with moved([layer.weight], [torch.ones(1, 2)]):
        ...     inside = layer.weight.detach().clone()
        >>> torch.equal(inside, before + 1), torch.equal(layer.weight, before)
        (True, True)
    """
    originals = [weight.data for weight in weights]
    try:
        for weight, step in zip(weights, steps, strict=True):
            weight.data = weight.data + step
        versions = [weight._version for weight in weights]
        yield
        if versions != [weight._version for weight in weights]:
            raise RuntimeError(
                "an optimizer stepped while the weights were perturbed (awp=), and its step would be lost: call "
                "self.manual_backward(loss) instead of loss.backward(), which puts the weights back first."
            )
    finally:
        for weight, original in zip(weights, originals, strict=True):
            weight.data = original
