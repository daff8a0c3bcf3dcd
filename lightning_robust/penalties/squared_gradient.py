"""How fast a scalar of the logits changes with the input, squared: the core of penalties on input gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.protocols import LogitsFn
from lightning_robust.randomness import RandomState

__all__ = ["Method", "check_settings", "squared_gradient"]

Method = Literal["finite_differences", "double_backward"]
"""How the square is had: one more forward at a neighbour, or a backward pass through the backward pass."""


def check_settings(owner: str, method: str, step: float) -> None:
    """Refuse settings that :func:`squared_gradient` cannot work with.

    Raises:
        ValueError: If the method is unknown, or the step is not a positive number.
    """
    if method not in get_args(Method):
        raise ValueError(f"{owner}(method=) must be one of {', '.join(map(repr, get_args(Method)))}, got {method!r}.")
    if not 0 < step < math.inf:
        raise ValueError(f"{owner}(step=) must be positive and finite (a share of the mean input norm), got {step}.")


def squared_gradient(
    scalar: Callable[[Tensor], Tensor],
    logits_fn: LogitsFn,
    x: Tensor,
    *,
    method: Method = "finite_differences",
    step: float = 0.13,
    logits: Tensor | None = None,
    reuse: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    r"""``||A * d s_i / d x_i||^2`` of each sample, differentiable with respect to the parameters behind ``logits_fn``.

    With double backward the square itself. With finite differences its estimate along the gradient's own direction,

    .. math:: \Big(\frac{s_i(x_i + h\,A d_i) - s_i(x_i)}{h}\Big)^2, \quad d_i = \frac{A g_i}{\|A g_i\|}, \quad
              g_i = \frac{\partial s_i}{\partial x_i}, \quad h = \mathrm{step} \cdot \mathrm{mean}_i \|x_i\|_2

    where the direction counts as constant. On smooth networks both agree as ``h`` goes to 0. On ReLU networks they are
    different regularisers: double backward does not see a unit that is about to switch, a small step sees the switch
    alone, as noise; hence the large default.

    Forwards: finite differences run two, double backward one, each one less where ``logits`` are given. All of ours
    see the same global random state (dropout drops the same units), which moves on as if there had been one. In
    training mode each moves BatchNorm's running statistics.

    Args:
        scalar: Logits ``(N, K, ...)`` to one number a sample, ``(N,)``.
        logits_fn: Inputs to logits.
        x: Inputs ``(N, ...)``; data, not something to learn: no gradient flows back beyond it.
        method: How the square is had.
        step: ``h`` as a share of the mean L2 norm of the inputs as the model gets them (of 1, if they are all zero).
        logits: The logits of ``x``, where they have been computed already. ``x`` must then be the tensor with
            ``requires_grad`` in their graph, and a random ``logits_fn`` must itself repeat what was drawn for them.
        reuse: Whether the graph of the logits can be kept for a second backward pass. If not (networks compiled with
            donated buffers), finite differences find their direction in one more forward, thrown away. Double backward
            takes no notice.
        mask: ``A``, in [0, 1], shaped like ``x``: where the gradient counts. Everywhere by default.

    Returns:
        ``(N,)``, float32 (float64 if everything is).

    Raises:
        ValueError: If ``x`` is not floating point, does not require grad although ``logits`` are given, or is not what
            the logits depend on; or if ``scalar`` does not return ``(N,)``.

    Example:
        >>> w = torch.tensor([3.0, 4.0])
        >>> squared_gradient(lambda z: z, lambda x: (x * w).sum(1), torch.rand(1, 2), method="double_backward")
        tensor([25.])

    References:
        Drucker & LeCun, Double Backpropagation Increasing Generalization Performance, 1991. Finlay & Oberman,
        `Scaleable Input Gradient Regularization for Adversarial Robustness <https://arxiv.org/abs/1905.11468>`_, 2019.
    """
    if not x.is_floating_point():
        raise ValueError(f"expected floating-point inputs, got {x.dtype}; instead of integer tokens give embeddings.")
    through_logits = reuse or method == "double_backward"
    again: Callable[[], None] = lambda: None  # noqa: E731
    if logits is None:
        # Two dropout masks would differ by more than a small step does.
        again = RandomState.capture().restore
        x = x.detach().requires_grad_(through_logits)
        logits = logits_fn(x)
    elif through_logits and not x.requires_grad:
        raise ValueError(
            "logits were given, but x does not require grad, so it is no part of their graph. Call x.requires_grad_() "
            "before the forward that computes them, or leave the logits out."
        )
    value = _one_a_sample(scalar(logits), x)

    def masked(t: Tensor) -> Tensor:
        return t if mask is None else t * mask

    if method == "double_backward":
        return masked(_gradient(value, x, create_graph=True)).flatten(1).square().sum(1)

    if through_logits:
        gradient = _gradient(value, x, retain_graph=True)
    else:
        again()
        leaf = x.detach().requires_grad_()
        gradient = _gradient(_one_a_sample(scalar(logits_fn(leaf)), x), leaf)
    x = x.detach()
    # Once more masked, the move is the gradient of z -> s(x + A z): its slope is ||A g|| for fractions in the mask too.
    move = masked(F.normalize(masked(gradient).flatten(1)).view_as(x))
    norm = x.flatten(1).to(move.dtype).norm(dim=1).mean()
    h = step * torch.where(norm > 0, norm, 1.0)
    again()
    there = _one_a_sample(scalar(logits_fn((x + h * move).to(x.dtype))), x)
    return ((there - value) / h).square()


def _one_a_sample(value: Tensor, x: Tensor) -> Tensor:
    if value.shape != x.shape[:1]:
        raise ValueError(
            f"expected one number for each of {len(x)} samples, got {tuple(value.shape)}: logits must be (N, K, ...) "
            f"for inputs (N, ...), here {tuple(x.shape)}."
        )
    return value


def _gradient(value: Tensor, x: Tensor, *, retain_graph: bool = False, create_graph: bool = False) -> Tensor:
    """Of the sum: with the mean, the weight of a penalty would depend on the batch size."""
    gradient = None
    if value.requires_grad:
        # autograd.grad, not backward(): the parameters' own gradients must stay as they are.
        (gradient,) = torch.autograd.grad(
            value.sum(), x, retain_graph=retain_graph or create_graph, create_graph=create_graph, allow_unused=True
        )
    if gradient is None:
        raise ValueError(
            "the logits do not depend on x: no gradient reaches it. Is x the very tensor they were computed from? Is "
            "the network (or a frozen backbone) run under torch.no_grad(), or is an output detached?"
        )
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))
