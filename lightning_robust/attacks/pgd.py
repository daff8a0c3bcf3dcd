"""Projected gradient descent (FGSM is one step of it)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_robust.attacks.joint import Threat
from lightning_robust.attacks.objectives import cross_entropy, input_gradient, margin_of
from lightning_robust.modes import gradients
from lightning_robust.pixels import Box
from lightning_robust.protocols import LogitsFn
from lightning_robust.randomness import Noise

__all__ = ["PGD"]


@dataclass(frozen=True)
class PGD:
    """Projected gradient ascent on an objective, inside a threat model.

    ``x <- project(x + step_size * steepest(gradient))``, repeated; the last iterate is returned. One step from a zero
    start is FGSM.

    Args:
        threat: The ball and the pixel space; for several inputs one for all of them, or a :class:`JointThreat`.
        steps: Gradient steps a start.
        step_size: In pixel units. ``None``: ``2.5 * eps / steps``, which can reach the far side of the ball.
        restarts: Independent starts; of their results the one with the largest margin is kept, sample by sample.
        start: ``"uniform"`` in the ball, ``"zero"`` (the clean input), or ``"gaussian"`` (TRADES' ``0.001 * N(0, 1)``,
            in units of the pixel range, for objectives whose gradient vanishes at the clean input). ``None``: what the
            training method needs, else uniform.
        objective: ``(logits, y) -> (N,)``, climbed. ``None``: the loss that the user's own step calls where a callback
            runs the attack, else cross-entropy.

    Raises:
        ValueError: If steps or restarts are below 1 or the step size is not positive.

    Example:
        The worst case of a linear model is a corner of the box around the input.

        >>> from lightning_robust import ThreatModel
        >>> w = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        >>> x, y = torch.full((1, 2), 0.5), torch.tensor([0])
        >>> PGD(ThreatModel("linf", eps=0.1), steps=5)(lambda x: x @ w, x, y)
        tensor([[0.4000, 0.6000]])

    References:
        Madry et al., `Towards Deep Learning Models Resistant to Adversarial Attacks
        <https://arxiv.org/abs/1706.06083>`_, 2018, section 2.1. Goodfellow et al., `Explaining and Harnessing
        Adversarial Examples <https://arxiv.org/abs/1412.6572>`_, 2015 (FGSM).
    """

    threat: Threat
    steps: int = 10
    step_size: float | None = None
    restarts: int = 1
    start: Literal["uniform", "zero", "gaussian"] | None = None
    objective: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"PGD({name}=) must be at least 1, got {getattr(self, name)}.")
        if self.start not in (None, "uniform", "zero", "gaussian"):
            raise ValueError(f"PGD(start=) must be 'uniform', 'zero', 'gaussian' or None, got {self.start!r}.")
        if self.step_size is None:
            return
        if not self.step_size > 0:
            raise ValueError(
                f"PGD(step_size=) must be positive, got {self.step_size}. Leave it out for 2.5 * eps / steps."
            )
        needed = (2 if self.start in (None, "uniform") else 1) * self.threat.eps
        if self.steps * self.step_size < needed * (1 - 1e-6):
            warnings.warn(
                f"{self.steps} steps of {self.step_size:.4g} walk {self.steps * self.step_size:.4g}, but the far side "
                f"of the ball is {needed:.4g} away: accuracy under this attack will look better than it is. Use "
                f"step_size={2.5 * self.threat.eps / self.steps:.4g} (the default) or more steps.",
                stacklevel=3,
            )

    @property
    def reach(self) -> float:
        """The largest distance from the clean input, in pixel units."""
        return self.threat.eps

    @property
    def name(self) -> str:
        """Short and unique for the settings that matter, for log keys: ``pgd20x2_linf_0.2``."""
        restarts = f"x{self.restarts}" if self.restarts > 1 else ""
        return f"pgd{self.steps}{restarts}_{self.threat}"

    def __call__(self, logits_fn: LogitsFn, x: Tensor, y: Tensor, *, generator: Noise = None) -> Tensor:
        """Perturb ``x`` (model inputs, ``(N, ...)``) against targets ``y``; the result has the type of ``x``.

        Raises:
            ValueError: If ``x`` lies outside the pixel space.
        """
        space, objective = self.threat.pixels, self.objective or cross_entropy
        with gradients(x, y) as (x, y):
            if space.outside == "raise":
                space.check(x)
            clean = space.to_pixels(x)
            box = space.box(clean)
            best = self._climb(objective, logits_fn, x, y, clean, box, generator)
            if self.restarts > 1:
                margin = margin_of(objective)

                def fooled_by(pixels: Tensor) -> Tensor:
                    with torch.no_grad():
                        return margin(logits_fn(space.to_model(pixels, x.dtype)), y)

                worst = fooled_by(best)
                for _ in range(self.restarts - 1):
                    other = self._climb(objective, logits_fn, x, y, clean, box, generator)
                    score = fooled_by(other)
                    better = (score > worst).view(-1, *[1] * (x.ndim - 1))
                    best, worst = torch.where(better, other, best), torch.maximum(worst, score)
            return space.to_model(best, x.dtype)

    def _climb(
        self, objective: Any, logits_fn: LogitsFn, x: Tensor, y: Tensor, clean: Tensor, box: Box, noise: Noise
    ) -> Tensor:
        threat = self.threat
        step = 2.5 * threat.eps / self.steps if self.step_size is None else self.step_size
        if self.start == "zero":
            pixels = clean
        elif self.start == "gaussian":
            pixels = threat.project(clean + threat.jitter(clean, noise), clean, box)
        else:
            pixels = threat.random_start(clean, box, noise)
        for _ in range(self.steps):
            gradient = input_gradient(objective, logits_fn, threat.pixels, pixels, y, like=x)
            pixels = threat.project(pixels + step * threat.steepest(gradient), clean, box)
        return pixels
