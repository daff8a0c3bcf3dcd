"""Right for the right reasons: predictions shall not depend on what a mask marks as irrelevant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_robust.losses import LossCall
from lightning_robust.penalties.derivatives import finite, forward, labelled, positions
from lightning_robust.penalties.features import spread
from lightning_robust.penalties.squared_gradient import Method, check_settings, squared_gradient
from lightning_robust.protocols import LogitsFn

__all__ = ["RightReasons"]


@dataclass(frozen=True)
class RightReasons:
    r"""The mean of ``sum(A * d/dx sum_k log p_k)^2 / sum(A)`` over the samples; 0 for one whose mask ``A`` is empty.

    ``A`` is 1 where the input must *not* matter. The log-probabilities of all classes are summed, as in the paper: the
    gradient of the loss itself vanishes where a model is sure of itself, shortcut or not. Of pixels, tokens or several
    labels the mean is taken.

    It is the mean over all samples that have a label, marked or not, so that the weight does not depend on the batch
    size; where one sample in a hundred has a mask, it wants a hundred times the weight.

    Args:
        mask_key: Where a batch holds the masks: a key, a position, or several on the way down. Read by the callback;
            a direct call is given the mask itself.
        method: ``"finite_differences"`` (one more forward, a step along ``A * gradient``) or ``"double_backward"``
            (exact; needs every layer to have a second derivative).
        step: Length of the finite step, as a share of the mean L2 norm of the inputs that the model gets.

    Raises:
        ValueError: If the method is unknown or the step is not positive.

    Example:
        The second input must not matter.

        >>> net = torch.nn.Linear(2, 3)
        >>> x, y, mask = torch.rand(4, 2), torch.tensor([0, 1, 2, 0]), torch.tensor([[0, 1]])
        >>> loss = torch.nn.functional.cross_entropy(net(x), y)
        >>> loss = loss + 10 * RightReasons()(net, x, y, mask=mask)
        >>> loss.backward()

    References:
        Ross, Hughes & Doshi-Velez, `Right for the Right Reasons: Training Differentiable Models by Constraining their
        Explanations <https://arxiv.org/abs/1703.03717>`_, 2017, equation 1, there without the division by ``sum(A)``.
    """

    name: ClassVar[str] = "right_reasons"
    starts_flat: ClassVar[bool] = True  # predictions are even before training, whatever they will be drawn from

    mask_key: str | int | tuple[str | int, ...] = "mask"
    method: Method = "finite_differences"
    step: float = 0.13

    def __post_init__(self) -> None:
        check_settings(type(self).__name__, self.method, self.step)

    def __call__(
        self,
        logits_fn: LogitsFn,
        x: Tensor,
        y: Tensor,
        *,
        mask: Tensor,
        call: Callable[[Tensor], LossCall] | None = None,
        logits: Tensor | None = None,
        reuse: bool = True,
    ) -> Tensor:
        """The penalty, a scalar, differentiable with respect to the parameters behind ``logits_fn``; 0 without marks.

        Args:
            logits_fn: Inputs to logits.
            x: Model inputs ``(N, ...)``.
            y: Targets; only their shape and type matter, which tell the kind of head.
            mask: 1 where the input must not matter, in [0, 1], of any type. The shape of ``x``, 1 instead of any size
                (the batch's too), or without the dimension of channels: ``(N, 1, H, W)`` and ``(N, H, W)`` both fit
                images ``(N, C, H, W)``, ``(N, T)`` fits sequences ``(N, T, F)`` and signals ``(N, C, T)``.
            call: Logits to the loss call that knows their log-probabilities, where it is not the usual one.
            logits: The logits of ``x``, if computed already; ``x`` is then the leaf of their graph.
            reuse: Whether that graph can be kept for a second backward pass (see :func:`squared_gradient`).

        Raises:
            ValueError: If the mask does not fit ``x`` or holds NaN or values outside [0, 1]; if no usual loss takes
                these logits and targets, or the logits do not depend on ``x``.
        """
        call = call or (lambda z: LossCall.for_head(z, y))
        mask = spread(mask, x)
        run = forward(logits_fn, x, logits, differentiable=reuse or self.method == "double_backward")
        here = call(run.logits)
        each, counted = positions(here), labelled(here, len(x)) > 0
        square = squared_gradient(
            lambda z: finite(call(z).log_probabilities()).flatten(1).sum(1) / each,
            run.again,
            run.x,
            method=self.method,
            step=self.step,
            logits=run.logits,
            reuse=reuse,
            mask=mask,
        )
        marked = mask.flatten(1).sum(1)
        weight = torch.where(counted & (marked > 0), 1 / marked, 0.0)
        return (square * weight).sum() / counted.sum().clamp_min(1)
