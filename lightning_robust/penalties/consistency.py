"""Saliency consistency: what a model looks at shall stay what it is under attack."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_robust.attacks.guard import guard
from lightning_robust.losses import LossCall
from lightning_robust.modes import frozen
from lightning_robust.penalties.derivatives import drawn, forward, input_gradient, one_a_sample, right_answer
from lightning_robust.penalties.features import ranges
from lightning_robust.penalties.squared_gradient import Method
from lightning_robust.protocols import LogitsFn
from lightning_robust.randomness import Noise, uniform

__all__ = ["SaliencyConsistency"]


@dataclass(frozen=True)
class SaliencyConsistency:
    r"""``mean_i (1 - cos(g(x_i), g(x'_i)))``: how far the input gradient turns between an input and one near by.

    ``g`` is the gradient of the right answer's score: the logit of the right class, not the loss, whose gradient
    vanishes where a model is sure, so that its direction would be round-off
    (:func:`~lightning_robust.penalties.derivatives.right_answer`). Both gradients are trained, so every layer must have
    a second derivative. A sample that has no gradient at one of the two counts 0.

    The other input is, whatever is there first: the clean one where the batch is attacked already (the callback beside
    :class:`~lightning_robust.AdversarialTraining` that feeds the step), what ``attack`` finds, or the input with some
    noise. ``method="trades"`` leaves the step its clean batch and attacks beside it: there too it is the own
    ``attack``, or noise.

    Args:
        attack: Any attack ``(logits_fn, x, y) -> x_adv``, run only where the batch is not attacked already. It leaves
            no trace in a module, and its random numbers are those of ``generator``.
        noise: Where there is no attack: uniform noise of up to so large a share of the range (of each channel of the
            image, or of each column in the batch).

    Raises:
        ValueError: If the noise is not positive.
        TypeError: If the attack is no callable.

    Example:
        The gradient of a linear model is the same everywhere.

        >>> net, x = torch.nn.Linear(2, 3), torch.rand(4, 2)
        >>> bool(SaliencyConsistency()(net, x, torch.tensor([0, 1, 2, 0])).abs() < 1e-6)
        True

    References:
        Wang & Kong, `Exploiting the Relationship Between Kendall's Rank Correlation and Cosine Similarity for
        Attribution Protection <https://arxiv.org/abs/2205.07279>`_, 2022 (there of integrated gradients). Chen et al.,
        `Robust Attribution Regularization <https://arxiv.org/abs/1905.09957>`_, 2019 (another distance).
    """

    name: ClassVar[str] = "saliency_consistency"
    starts_at_zero: ClassVar[bool] = True  # a network is next to linear before training
    method: ClassVar[Method] = "double_backward"  # there is no other way to it

    attack: Callable[..., Any] | None = None
    noise: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.noise < float("inf"):
            raise ValueError(
                f"SaliencyConsistency(noise=) must be positive and finite (a share of the range), got {self.noise}."
            )
        if self.attack is not None:
            guard(self.attack)  # says what is no attack

    def __call__(
        self,
        logits_fn: LogitsFn,
        x: Tensor,
        y: Tensor,
        *,
        call: Callable[[Tensor], LossCall] | None = None,
        logits: Tensor | None = None,
        clean: Tensor | None = None,
        attacked: Tensor | None = None,
        generator: Noise = None,
    ) -> Tensor:
        """The penalty, a scalar, differentiable with respect to the parameters behind ``logits_fn``.

        Args:
            logits_fn: Inputs to logits. Where it is a module, attacks are crafted in evaluation mode.
            x: Model inputs ``(N, ...)``.
            y: Targets, which say whose gradient is meant.
            call: Logits to the loss call of the head, where it is not the usual one.
            logits: The logits of ``x``, if computed already; ``x`` is then the leaf of their graph.
            clean: The inputs before they were attacked, where ``x`` are attacked ones.
            attacked: The attacked inputs, where they were crafted already and ``x`` are clean ones.
            generator: Of the attack or the noise; None seeds one from torch's global stream.

        Raises:
            ValueError: If no usual loss takes these logits and targets, the logits do not depend on ``x``, or the two
                inputs have different shapes.
        """
        call = call or (lambda z: LossCall.for_head(z, y))
        other = clean if clean is not None else attacked
        other = self._near(logits_fn, x.detach(), y, drawn(generator)) if other is None else other
        if other.shape != x.shape:
            raise ValueError(f"expected two inputs of one shape, got {tuple(x.shape)} and {tuple(other.shape)}.")
        run = forward(logits_fn, x, logits)
        leaf = other.detach().to(x.dtype).requires_grad_()
        here, there = (
            input_gradient(one_a_sample(right_answer(call(z)), at), at, create_graph=True).flatten(1)
            for z, at in ((run.logits, run.x), (run.again(leaf), leaf))
        )
        return _turn(here, there).mean()

    def _near(self, logits_fn: LogitsFn, x: Tensor, y: Tensor, generator: Noise) -> Tensor:
        if self.attack is None:
            low, high = ranges(x, 1)
            return x + self.noise * (high - low) * (2 * uniform(x, generator) - 1)
        with frozen(logits_fn) if isinstance(logits_fn, nn.Module) else nullcontext():
            return guard(self.attack)(logits_fn, x, y, generator=generator)


def _turn(a: Tensor, b: Tensor) -> Tensor:
    """``1 - cos`` of each pair of rows; 0 where one of them is 0."""
    squares = a.square().sum(1), b.square().sum(1)
    there = (squares[0] > 0) & (squares[1] > 0)
    # The root of 0 has no derivative; a constant in its place keeps NaN out of the gradients of the other rows.
    lengths = [torch.where(there, square, 1.0).sqrt() for square in squares]
    return torch.where(there, 1 - (a * b).sum(1) / (lengths[0] * lengths[1]), 0.0)
