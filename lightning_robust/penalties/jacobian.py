"""The penalty on the Jacobian: small changes of the input shall change no output much, right class or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.losses import LossCall
from lightning_robust.penalties.derivatives import drawn, finite, forward, positions
from lightning_robust.penalties.squared_gradient import Method, check_settings, squared_gradient
from lightning_robust.protocols import LogitsFn
from lightning_robust.randomness import Noise, normal

__all__ = ["JacobianPenalty"]


@dataclass(frozen=True)
class JacobianPenalty:
    r"""``(1/2) mean_i ||J_i||_F^2``, where ``J_i`` holds the derivatives of all outputs of sample ``i`` by its input.

    It needs no labels, and does not vanish where a model is sure, as the gradient of the loss does. The norm is
    estimated from random directions of the outputs,

    .. math:: \|J\|_F^2 \approx \frac{C}{n} \sum_{j=1}^n \Big\|\frac{\partial (v_j \cdot f)}{\partial x}\Big\|^2,

    with ``v_j`` uniform on the unit sphere of the ``C`` outputs, drawn anew for each sample and step. Those of one
    sample are orthogonal to each other, so that ``C`` of them give the norm exactly. The outputs are what the loss is
    given: logits, or log-probabilities or probabilities where it takes those. Pixels, tokens or labels of a sample are
    outputs of their own; the squared norm is divided by their number, over which the loss averages too. Classes that
    are switched off (-inf) add nothing.

    Args:
        projections: ``n``; one is enough in training. More than there are outputs are not drawn.
        method: ``"finite_differences"`` (one more forward for each projection; works with every network) or
            ``"double_backward"`` (exact for these directions; needs every layer to have a second derivative).
        step: Length of the finite step, as a share of the mean L2 norm of the inputs that the model gets.

    Raises:
        ValueError: If the method is unknown, the step is not positive, or projections is below 1.

    Example:
        Of a linear model it is half the sum of its squared weights.

        >>> net = torch.nn.Linear(2, 3, bias=False)
        >>> penalty = JacobianPenalty(projections=3)(net, torch.rand(4, 2), torch.zeros(4).long())
        >>> bool((penalty - net.weight.square().sum() / 2).abs() < 1e-4)
        True

    References:
        Hoffman, Roberts & Yaida, `Robust Learning with Jacobian Regularization <https://arxiv.org/abs/1908.02729>`_,
        2019, equations 4 to 9; there the directions are independent of each other.
    """

    name: ClassVar[str] = "jacobian"
    starts_flat: ClassVar[bool] = True  # before training nothing that the input does changes the outputs much
    auto_share: ClassVar[float] = 0.1  # of the loss: what answers depend on, they have to depend on

    projections: int = 1
    method: Method = "finite_differences"
    step: float = 0.13

    def __post_init__(self) -> None:
        check_settings(type(self).__name__, self.method, self.step)
        if self.projections < 1:
            raise ValueError(f"JacobianPenalty(projections=) must be at least 1, got {self.projections}.")

    def __call__(
        self,
        logits_fn: LogitsFn,
        x: Tensor,
        y: Tensor,
        *,
        call: Callable[[Tensor], LossCall] | None = None,
        logits: Tensor | None = None,
        reuse: bool = True,
        generator: Noise = None,
    ) -> Tensor:
        """The penalty, a scalar, differentiable with respect to the parameters behind ``logits_fn``.

        Args:
            logits_fn: Inputs to logits.
            x: Model inputs ``(N, ...)``.
            y: Not needed; penalties are called alike. Only its shape and type tell several labels from one.
            call: Logits to the loss call of the head, which tells several labels from one where ``y`` does not.
            logits: The logits of ``x``, if computed already; ``x`` is then the leaf of their graph.
            reuse: Whether that graph can be kept for a second backward pass (see :func:`squared_gradient`).
            generator: Of the directions; None seeds one from torch's global stream.

        Raises:
            ValueError: If the logits do not depend on ``x``, or are not one row a sample.
        """
        generator = drawn(generator)
        run = forward(logits_fn, x, logits, differentiable=reuse or self.method == "double_backward")
        n = len(x)
        outputs = _flat(run.logits.detach(), n)
        directions = _directions(outputs, min(self.projections, outputs.shape[1]), generator)
        squares = [
            squared_gradient(
                lambda z, v=v: (_flat(z, n) * v).sum(1),  # type: ignore[misc]  # mypy cannot type a default of a lambda
                run.again,
                run.x,
                method=self.method,
                step=self.step,
                logits=run.logits,
                reuse=reuse,
            ).mean()
            for v in directions
        ]
        here = _head(run.logits, y) if call is None else call(run.logits)
        each = positions(here) * (len(run.logits) // n)
        return 0.5 * outputs.shape[1] * torch.stack(squares).mean() / each


def _head(z: Tensor, y: Tensor) -> LossCall:
    """One class of many, or several labels, as far as shapes tell; whether targets fit does not matter."""
    several = isinstance(y, Tensor) and y.is_floating_point() and y.shape == z.shape
    return LossCall("binary_cross_entropy_with_logits" if several else "cross_entropy", z, y)


def _flat(z: Tensor, n: int) -> Tensor:
    """All outputs of each of ``n`` samples in a row, float32 or more.

    Raises:
        ValueError: If the outputs are not those of ``n`` samples.
    """
    if not n or len(z) % n:
        raise ValueError(f"expected outputs (N, ...) of {n} samples, or as many rows for each, got {tuple(z.shape)}.")
    return finite(z.reshape(n, -1).to(torch.promote_types(z.dtype, torch.float32)))


def _directions(outputs: Tensor, number: int, generator: Noise) -> list[Tensor]:
    """Orthogonal directions, each uniform on the unit sphere, ``(N, C)`` each."""
    normals = normal(outputs.unsqueeze(2).expand(-1, -1, number), generator)
    # The first factor of a Gaussian matrix prefers no way to any other; a single column only needs its length.
    frame = F.normalize(normals, dim=1) if number == 1 else torch.linalg.qr(normals)[0]
    return list(frame.unbind(2))
