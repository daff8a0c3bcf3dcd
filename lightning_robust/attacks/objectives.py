"""The per-sample scalars that an attack climbs: functions of class logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.protocols import Objective

__all__ = ["OBJECTIVES", "cross_entropy", "dlr", "gaps", "margin", "sample_margin", "targeted_dlr"]

_NO_SPREAD = 1e-12  # logits that are all equal


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of logits ``(N, K, ...)`` and classes ``(N, ...)`` or class probabilities, ``(N,)``.

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])
    """
    loss = F.cross_entropy(logits.float(), y, reduction="none")
    return loss.flatten(1).sum(1) if loss.ndim > 1 else loss


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
    gap = gaps(logits, y)
    return gap.flatten(1).mean(1) if gap.ndim > 1 else gap


def sample_margin(gap: Tensor, counted: Tensor | None = None) -> Tensor:
    """How far a sample is fooled, ``(N,)``, from the margins of its predictions; above 0 all of them are wrong.

    Where there are several (pixels, labels) it is the share that is wrong, minus 1, and their mean margin decides
    between equal shares. What is NaN is no answer, and wrong.

    Args:
        gap: Of every prediction, ``(N, ...)``.
        counted: Which predictions have a label, ``(N, ...)``; None for all.

    Example:
        >>> sample_margin(torch.tensor([[3.0, -1.0], [3.0, 1.0]])) > 0
        tensor([False,  True])
    """
    gap = gap.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if gap.shape[1:].numel() == 1:
        return gap.reshape(len(gap))
    gap = gap.flatten(1)
    counts = torch.ones_like(gap) if counted is None else counted.flatten(1).to(gap)
    number = counts.sum(1).clamp_min(1)
    wrong = ((gap > 0) * counts).sum(1) / number
    mean = (gap.clamp(-1e6, 1e6) * counts).sum(1) / number
    return wrong - 1 + 0.5 * mean.tanh() / number


def gaps(logits: Tensor, y: Tensor) -> Tensor:
    """The margin of every prediction, ``(N, ...)``; 0 where there is no right class. See :func:`margin`."""
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
    return (wrong - right).masked_fill(ignored, 0.0)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    r"""Difference of logits ratio, ``(N,)``: the margin in units of the logits' own spread.

    .. math:: -\frac{z_y - \max_{i \ne y} z_i}{z_{(1)} - z_{(3)}}

    Neither a shift nor a factor of the logits moves it, so that a network which is merely too sure of itself cannot
    hide. Where there is no third (finite) logit to divide by, it is the margin.

    Args:
        logits: Shape ``(N, K, ...)`` with ``K >= 2``; further dimensions (pixels) are averaged.
        y: Classes ``(N, ...)`` or class probabilities ``(N, K, ...)``.

    Example:
        >>> dlr(torch.tensor([[3.0, 1.0, 0.0], [300.0, 100.0, 0.0]]), torch.tensor([0, 0]))
        tensor([-0.6667, -0.6667])

    References:
        Croce and Hein, `Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks <https://arxiv.org/abs/2003.01690>`_, 2020, equation 6.
    """
    gap = gaps(logits, y)
    if logits.shape[1] > 2:
        top = logits.float().topk(3, 1).values
        gap = gap / _spread(top[:, 0] - top[:, 2])
    return gap.flatten(1).mean(1) if gap.ndim > 1 else gap


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    r"""The same towards one class, ``(N,)``.

    .. math:: -\frac{z_y - z_t}{z_{(1)} - (z_{(3)} + z_{(4)}) / 2}

    With fewer than four (finite) logits it is the difference ``z_t - z_y`` alone.

    Args:
        logits: Shape ``(N, K, ...)`` with ``K >= 2``; further dimensions (pixels) are averaged.
        y: Classes ``(N, ...)`` to leave; negative where there is none.
        target: Classes ``(N, ...)`` to reach.

    Example:
        >>> targeted_dlr(torch.tensor([[4.0, 2.0, 1.0, 1.0]]), torch.tensor([0]), torch.tensor([1]))
        tensor([-0.6667])

    References:
        Croce and Hein, 2020, equation 7.
    """
    z = logits.float()
    gap = (z.gather(1, target.unsqueeze(1)) - z.gather(1, y.clamp_min(0).unsqueeze(1))).squeeze(1)
    gap = gap.masked_fill(y < 0, 0.0)
    if z.shape[1] >= 4:
        top = z.topk(4, 1).values
        gap = gap / _spread(top[:, 0] - (top[:, 2] + top[:, 3]) / 2)
    return gap.flatten(1).mean(1) if gap.ndim > 1 else gap


def _spread(spread: Tensor) -> Tensor:
    """What a difference of logits is divided by; 1 where a logit is infinite (a class that is switched off)."""
    return torch.where(spread.isfinite(), spread.clamp_min(_NO_SPREAD), 1.0)


OBJECTIVES: dict[str, Objective] = {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}
"""Objectives by name. ``"kl"`` is one more; it needs the clean prediction."""
