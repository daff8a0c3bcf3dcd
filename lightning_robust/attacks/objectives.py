"""The per-sample scalars that an attack climbs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.pixels import ModelUnits
from lightning_robust.protocols import LogitsFn, Objective

__all__ = ["cross_entropy", "input_gradient", "margin", "margin_of"]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of logits ``(N, K, ...)`` and classes ``(N, ...)`` or class probabilities, ``(N,)``.

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])
    """
    return (
        F.cross_entropy(logits.float(), y, reduction="none").flatten(1).sum(1)
        if logits.ndim > 2
        else (F.cross_entropy(logits.float(), y, reduction="none"))
    )


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """How far the best wrong class lies above the right one, ``(N,)``; above 0 the model is fooled.

    Unlike cross-entropy it ranks a confident mistake above an unsure right answer, whatever the number of classes.

    Args:
        logits: Shape ``(N, K, ...)`` with ``K >= 2``; further dimensions (pixels) are averaged.
        y: Classes ``(N, ...)`` or class probabilities ``(N, K, ...)``.

    Raises:
        ValueError: If the shapes do not belong together.

    Example:
        >>> margin(torch.tensor([[3.0, 1.0], [3.0, 1.0]]), torch.tensor([0, 1]))
        tensor([-2.,  2.])
    """
    if y.shape == logits.shape and logits.ndim > 1:
        y = y.argmax(1)
    if logits.ndim < 2 or logits.shape[1] < 2 or y.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            f"margin expects logits (N, K, ...) with K >= 2 and classes (N, ...), got {tuple(logits.shape)} and "
            f"{tuple(y.shape)}. An objective for another head brings its own `margin` method."
        )
    z = logits.float()
    # Ignored targets (negative by convention) have no right class; index 0 stands in and is masked below.
    ignored = y < 0
    index = y.clamp_min(0).long().unsqueeze(1)
    right = z.gather(1, index).squeeze(1)
    wrong = z.scatter(1, index, -torch.inf).amax(1)
    gap = (wrong - right).masked_fill(ignored, 0.0)
    return gap.flatten(1).mean(1) if gap.ndim > 1 else gap


def margin_of(objective: Objective) -> Callable[[Tensor, Tensor], Tensor]:
    """The margin that belongs to an objective: its own, where its head is not a plain multi-class one."""
    own: Callable[[Tensor, Tensor], Tensor] = getattr(objective, "margin", margin)
    return own


def input_gradient(
    objective: Objective, logits_fn: LogitsFn, space: ModelUnits, pixels: Tensor, y: Tensor, like: Tensor
) -> Tensor:
    """Gradient of the summed per-sample objective with respect to ``pixels``.

    The sum, not the mean: a sample's gradient then neither depends on the batch size nor underflows in half precision.

    Raises:
        RuntimeError: If the logits do not depend on the input.
    """
    pixels = pixels.detach().requires_grad_()
    value = objective(logits_fn(space.to_model(pixels, like.dtype)), y).sum()
    # autograd.grad, not backward(): the parameters' own gradients must stay as they are.
    (gradient,) = torch.autograd.grad(value, pixels, allow_unused=True) if value.requires_grad else (None,)
    if gradient is None:
        raise RuntimeError(
            "the logits do not depend on the input: no gradient reaches it. Is the network (or a frozen backbone) run "
            "under torch.no_grad(), or is the output detached?"
        )
    return gradient
