"""The penalty on the loss's input gradient: small changes of the input shall change the loss little."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_robust.losses import LossCall
from lightning_robust.penalties.derivatives import forward, labelled
from lightning_robust.penalties.squared_gradient import Method, check_settings, squared_gradient
from lightning_robust.protocols import LogitsFn

__all__ = ["InputGradientPenalty"]


@dataclass(frozen=True)
class InputGradientPenalty:
    r"""``mean_i ||d L_i / d x_i||^2``, where ``L_i`` is the loss of sample ``i``.

    Of pixels, tokens or several labels ``L_i`` is the mean over those of the sample that have a label, as in the usual
    loss. Samples without any label do not count.

    It makes a model flatter, and so more robust, not more truthful: a model that looks at a shortcut goes on doing so
    (there :class:`~lightning_robust.penalties.RightReasons` helps). The weight does not depend on the batch size.

    Args:
        method: ``"finite_differences"`` (one more forward; works with every network, attention and compiled ones
            included) or ``"double_backward"`` (exact; needs every layer to have a second derivative).
        step: Length of the finite step, as a share of the mean L2 norm of the inputs that the model gets. Large on
            purpose: small steps are noisy on ReLU networks.

    Raises:
        ValueError: If the method is unknown or the step is not positive.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 3)
        >>> x, y = torch.rand(4, 2), torch.tensor([0, 1, 2, 0])
        >>> loss = torch.nn.functional.cross_entropy(net(x), y)
        >>> loss = loss + 0.1 * InputGradientPenalty()(net, x, y)
        >>> loss.backward()

    References:
        Drucker & LeCun, Double Backpropagation Increasing Generalization Performance, 1991. Ross & Doshi-Velez,
        `Improving the Adversarial Robustness and Interpretability of Deep Neural Networks by Regularizing their Input
        Gradients <https://arxiv.org/abs/1711.09404>`_, 2018. Finlay & Oberman, `Scaleable Input Gradient Regularization
        for Adversarial Robustness <https://arxiv.org/abs/1905.11468>`_, 2019 (finite differences).
    """

    name: ClassVar[str] = "input_gradient"
    starts_flat: ClassVar[bool] = True  # before training nothing that the input does changes the loss much
    auto_share: ClassVar[float] = 0.1  # of the loss: what answers depend on, they have to depend on

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
        call: Callable[[Tensor], LossCall] | None = None,
        logits: Tensor | None = None,
        reuse: bool = True,
    ) -> Tensor:
        """The penalty, a scalar, differentiable with respect to the parameters behind ``logits_fn``.

        Args:
            logits_fn: Inputs to logits.
            x: Model inputs ``(N, ...)``.
            y: Targets, for the usual loss of the head.
            call: Logits to the loss whose gradient is meant, where it is not the usual one.
            logits: The logits of ``x``, if computed already; ``x`` is then the leaf of their graph.
            reuse: Whether that graph can be kept for a second backward pass (see :func:`squared_gradient`).

        Raises:
            ValueError: If no usual loss takes these logits and targets, or the logits do not depend on ``x``.
        """
        call = call or (lambda z: LossCall.for_head(z, y))
        run = forward(logits_fn, x, logits, differentiable=reuse or self.method == "double_backward")
        found = labelled(call(run.logits), len(x))
        square = squared_gradient(
            lambda z: call(z).per_sample().reshape(len(found), -1).sum(1) / found.clamp_min(1),
            run.again,
            run.x,
            method=self.method,
            step=self.step,
            logits=run.logits,
            reuse=reuse,
        )
        return square.sum() / (found > 0).sum().clamp_min(1)
