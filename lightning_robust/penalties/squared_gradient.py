"""How fast a scalar of the logits changes with the input, squared: the core of penalties on input gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.penalties.derivatives import forward, input_gradient, one_a_sample
from lightning_robust.protocols import LogitsFn

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
    through_logits = reuse or method == "double_backward"
    run = forward(logits_fn, x, logits, differentiable=through_logits)
    x, value = run.x, one_a_sample(scalar(run.logits), run.x)

    def masked(t: Tensor) -> Tensor:
        return t if mask is None else t * mask

    if method == "double_backward":
        return masked(input_gradient(value, x, create_graph=True)).flatten(1).square().sum(1)

    gradient = input_gradient(value, x, retain_graph=True) if through_logits else run.gradient(scalar, reuse=False)
    x = x.detach()
    # Once more masked, the move is the gradient of z -> s(x + A z): its slope is ||A g|| for fractions in the mask too.
    move = masked(F.normalize(masked(gradient).flatten(1)).view_as(x))
    norm = x.flatten(1).to(move.dtype).norm(dim=1).mean()
    h = step * torch.where(norm > 0, norm, 1.0)
    there = one_a_sample(scalar(run.again((x + h * move).to(x.dtype))), x)
    return ((there - value) / h).square()
