"""What all saliency methods share: checked inputs, one view of heads, gradients on, chunks of samples, summed channels.

A method's own file is its mathematics, a function of one chunk; :func:`explained` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_robust.modes import gradients
from lightning_robust.protocols import LogitsFn

__all__ = ["Attribute", "broadcast", "check_inputs", "class_logits", "explained", "of_targets", "without_channels"]

Attribute = Callable[..., Tensor]
"""Class logits' function, inputs ``(M, ...)`` that require gradients, targets ``(M,)``, and what goes beside each
sample, to maps ``(M, ...)`` without channels."""


def explained(
    attribute: Attribute, logits_fn: LogitsFn, x: Tensor, target: Tensor, chunk_size: int | None, *beside: Tensor
) -> Tensor:
    """Maps of all samples, a chunk at a time, in whatever context the caller is.

    Args:
        attribute: See :data:`Attribute`.
        logits_fn: What the caller was given: inputs ``(M, ...)`` to logits ``(M, K)``, or one yes/no logit a sample.
        x: Inputs ``(N, ...)``, floating point; not changed.
        target: The classes to explain, ``(N,)``.
        chunk_size: Samples a forward; ``None`` for all of them.
        beside: Tensors ``(N, ...)`` that go with the samples, such as baselines.

    Returns:
        Maps in float32 on the device of ``x``, detached, never inference tensors.

    Raises:
        ValueError: If ``x`` has no batch dimension or is not floating point, there is not one target class for each
            sample, the logits have no such class, or ``chunk_size`` is below 1.

    Example:
        >>> x, target = torch.ones(5, 2), torch.zeros(5, dtype=torch.long)
        >>> explained(lambda logits, x, target: x * len(x), lambda x: x, x, target, 2)[:, 0]
        tensor([2., 2., 2., 2., 1.])
    """
    check_inputs(x, target, chunk_size)
    size = chunk_size or max(len(x), 1)
    with gradients(x, target.to(x.device), *beside) as (x, target, *beside):  # type: ignore[assignment]  # a tuple
        target = target.long()
        view = class_logits(logits_fn, target)
        chunks = zip(*(torch.split(part, size) for part in (x, target, *beside)), strict=True)
        maps = [attribute(view, rows.requires_grad_(), *others).detach().float() for rows, *others in chunks]
        return torch.cat(maps)


def class_logits(logits_fn: LogitsFn, target: Tensor | None = None) -> LogitsFn:
    """Logits with a class dimension, ``(M, K)``, also where a model says only yes or no.

    One logit a sample, ``(M,)`` or ``(M, 1)``, counts as two classes: class 1 is the logit, class 0 its negative.

    Args:
        logits_fn: Inputs to logits. It is given a copy of them, since its first operation may be in place.
        target: Classes that must be among those of the logits.

    Raises:
        ValueError: By the function returned, if what it gets are no logits of one class a sample.

    Example:
        >>> class_logits(lambda x: x)(torch.tensor([2.0, -1.0]))
        tensor([[-2.,  2.],
                [ 1., -1.]])
    """
    # Looked up once: on an accelerator every look waits for the device.
    lowest, highest = (0, 0) if target is None or not len(target) else (int(target.min()), int(target.max()))

    def logits(x: Tensor) -> Tensor:
        z = logits_fn(x.clone())
        if z.ndim not in (1, 2) or len(z) != len(x):
            raise ValueError(
                f"expected logits ({len(x)}, K) of {len(x)} inputs, got {tuple(z.shape)}: one class a sample can be "
                f"explained. Give a logits_fn that picks or averages."
            )
        if z.ndim == 1 or z.shape[1] == 1:
            yes = z.reshape(-1, 1)
            z = torch.cat([-yes, yes], dim=1)
        if lowest < 0 or highest >= z.shape[1]:
            raise ValueError(f"target classes go from {lowest} to {highest}, but the logits have {z.shape[1]} classes.")
        if torch.is_grad_enabled() and x.requires_grad and not z.requires_grad:
            raise ValueError(
                "the logits have no gradient with respect to the inputs: is there a torch.no_grad(), .detach() or "
                ".data on the way? Occlusion and attention rollout need none."
            )
        return z

    return logits


def of_targets(logits: LogitsFn, x: Tensor, target: Tensor) -> Tensor:
    """The targets' logits ``(M,)``, of class logits."""
    return logits(x).gather(1, target[:, None])[:, 0]


def broadcast(baseline: float | Tensor, x: Tensor) -> Tensor:
    """A baseline for each sample, shaped like ``x``: of a number, or of a tensor that broadcasts against ``x``.

    Raises:
        ValueError: If it does not.

    Example:
        >>> broadcast(torch.tensor([[1.0], [2.0]]), torch.zeros(3, 2, 2))[0]
        tensor([[1., 1.],
                [2., 2.]])
    """
    start = torch.as_tensor(baseline, dtype=x.dtype, device=x.device)
    try:
        return start.expand_as(x)
    except RuntimeError as error:
        raise ValueError(
            f"baseline= must be a number or broadcast against inputs {tuple(x.shape)}, got {tuple(start.shape)}. One "
            f"value a channel is a tensor (C, 1, 1)."
        ) from error


def without_channels(maps: Tensor) -> Tensor:
    """Maps ``(N, C, ...)`` summed over channels; ``(N, D)`` has none and stays."""
    return maps.sum(1) if maps.ndim > 2 else maps


def check_inputs(x: Tensor, target: Tensor, chunk_size: int | None) -> None:
    """Whether these can be explained.

    Raises:
        ValueError: If not; see :func:`explained`.
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(
            f"expected floating point inputs (N, ...), got {x.dtype} {tuple(x.shape)}. Nothing can be differentiated "
            f"with respect to integers; explain what they are embedded to."
        )
    if target.shape != x.shape[:1]:
        raise ValueError(f"expected one target class per sample, ({len(x)},), got {tuple(target.shape)}.")
    if not len(x):
        raise ValueError("expected at least one input to explain, got none.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size= is the number of samples a forward, at least 1 (None: all); got {chunk_size}.")
