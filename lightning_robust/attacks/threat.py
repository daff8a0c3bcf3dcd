"""What the adversary may do: norm and radius, in pixel units, inside a pixel space."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_robust.pixels import Box, PixelSpace, clamped
from lightning_robust.randomness import Noise, normal, uniform

if TYPE_CHECKING:
    from lightning_robust.attacks.local import LocalThreat

__all__ = ["ThreatModel", "into_ball", "per_sample"]


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """One number a sample, ``(N,)``, in a shape that multiplies ``like``."""
    return values.view(-1, *[1] * (like.ndim - 1))


def into_ball(norm: str, delta: Tensor, radius: Tensor | float) -> Tensor:
    """The nearest perturbation of at most this length."""
    if norm == "linf":
        return (
            torch.minimum(torch.maximum(delta, -radius), radius)
            if isinstance(radius, Tensor)
            else delta.clamp(-radius, radius)
        )
    length = per_sample(delta.flatten(1).norm(dim=1), delta)
    return delta * (radius / length.clamp_min(1e-12)).clamp(max=1.0)


@dataclass(frozen=True)
class ThreatModel:
    """A ball of perturbations around each input, cut by the legal pixel range.

    All methods take and give *pixels*, batch first.

    Args:
        norm: ``"linf"`` (every pixel moves by at most eps) or ``"l2"`` (Euclidean length of the change, per sample).
        eps: Radius in pixel units, e.g. ``8 / 255`` for images in [0, 1] and ``8`` for images in 0..255.
        pixels: Bounds and normalisation of the inputs.

    Raises:
        ValueError: If the norm is unknown or eps is negative or not finite.

    Example:
        >>> threat = ThreatModel("linf", eps=0.1)
        >>> threat.project(torch.tensor([[0.9, 0.2]]), torch.tensor([[0.5, 0.25]]), (0.0, 1.0))
        tensor([[0.6000, 0.2000]])
    """

    norm: Literal["linf", "l2"]
    eps: float
    pixels: PixelSpace = PixelSpace()

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"ThreatModel(norm=) must be 'linf' or 'l2', got {self.norm!r}.")
        if isinstance(self.eps, str) or not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"ThreatModel(eps=) must be a number >= 0 in pixel units, e.g. 8 / 255, got {self.eps!r}.")

    def __str__(self) -> str:
        return f"{self.norm}_{self.eps:.4g}"

    def scaled(self, fraction: float) -> ThreatModel:
        """The same threat with ``fraction`` of the radius."""
        return replace(self, eps=self.eps * fraction)

    def widened(self) -> ThreatModel:
        """The same threat for inputs that may overshoot the bounds: each such value keeps its own, wider bound."""
        return replace(self, pixels=replace(self.pixels, outside="widen"))

    def within(self, mask: Tensor | None = None, eps: Tensor | None = None) -> LocalThreat:
        """The same threat for one batch, where it is not the same everywhere.

        Args:
            mask: Not zero where pixels may change, ``(N, ...)`` or ``(1, ...)``.
            eps: A radius for each sample, ``(N,)``, in pixel units.

        Raises:
            ValueError: If a radius is negative or not finite, there is not one for each sample, or the threat model's
                own radius, in which steps are measured, is 0.

        Example:
            >>> left = ThreatModel("linf", eps=0.1).within(mask=torch.tensor([[1, 0]]))
            >>> left.project(torch.tensor([[0.9, 0.9]]), torch.tensor([[0.5, 0.5]]), (0.0, 1.0))
            tensor([[0.6000, 0.5000]])
        """
        from lightning_robust.attacks.local import LocalThreat

        if eps is not None and not bool((eps.isfinite() & (eps >= 0)).all()):
            raise ValueError(f"within(eps=) takes radii >= 0 in pixel units, got {eps.tolist()}.")
        if eps is not None and (eps.ndim != 1 or (self.eps == 0 and bool((eps > 0).any()))):
            raise ValueError(
                f"within(eps=) takes radii (N,) of a threat model with a radius above 0, in which steps are measured; "
                f"got {tuple(eps.shape)} and {self}."
            )
        return LocalThreat(self, eps, mask)

    def noise(self, clean: Tensor, noise: Noise = None) -> Tensor:
        """A uniformly distributed point of a ball around zero for each sample of ``clean``."""
        if self.norm == "linf":
            return (2 * uniform(clean, noise) - 1) * self.eps
        # Uniform in a d-ball: a uniform direction at radius eps * U^(1/d).
        direction = self.steepest(normal(clean, noise))
        # One radius a sample, drawn as a batch of scalars so that per-sample generators serve here too.
        radius = uniform(clean.flatten(1)[:, :1], noise) ** (1 / max(clean[0].numel(), 1))
        return direction * per_sample(radius, clean) * self.eps

    def jitter(self, clean: Tensor, noise: Noise = None) -> Tensor:
        """TRADES' start, ``0.001 * N(0, 1)``, which is meant for pixels in [0, 1]: in proportion for other bounds."""
        low, high = self.pixels.bounds or (0.0, 1.0)
        return 0.001 * (high - low) * normal(clean, noise)

    def random_start(self, clean: Tensor, box: Box, noise: Noise = None) -> Tensor:
        """A uniformly distributed point of each ball, moved into the box."""
        return clamped(clean + self.noise(clean, noise), box)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The unit step that climbs ``gradient`` fastest in this norm; zero where the gradient is zero."""
        if self.norm == "linf":
            return gradient.sign()
        # By the largest entry first: the squares of tiny gradients underflow, and a very sure model would look robust.
        largest = gradient.flatten(1).abs().amax(1).clamp_min(torch.finfo(gradient.dtype).tiny)
        gradient = gradient / per_sample(largest, gradient)
        return gradient / per_sample(gradient.flatten(1).norm(dim=1).clamp_min(0.5), gradient)  # 1 or more, or all zero

    def project(self, perturbed: Tensor, clean: Tensor, box: Box) -> Tensor:
        """The nearest point of the ball, then of the box (which keeps it in the ball, as ``clean`` is in the box)."""
        return clamped(clean + into_ball(self.norm, perturbed - clean, self.eps), box)

    def distance(self, perturbed: Tensor, clean: Tensor) -> Tensor:
        """How far each sample was moved, ``(N,)``, in pixel units."""
        delta = (perturbed - clean).flatten(1)
        return delta.abs().amax(1) if self.norm == "linf" else delta.norm(dim=1)

    def excess(self, perturbed: Tensor, clean: Tensor, reach: float) -> Tensor:
        """By how much each sample was moved farther than ``reach``, ``(N,)``, in pixel units."""
        return self.distance(perturbed, clean) - reach
