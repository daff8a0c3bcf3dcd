"""N-FGSM: one gradient step from strong noise, not clipped back: adversarial training at the price of one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_robust.attacks.heads import check_objective
from lightning_robust.attacks.joint import Threat
from lightning_robust.attacks.search import searching
from lightning_robust.pixels import clamped
from lightning_robust.protocols import LogitsFn
from lightning_robust.randomness import Noise

__all__ = ["NFGSM"]


@dataclass(frozen=True)
class NFGSM:
    """One gradient-sign step from uniform noise, without clipping the sum to the ball.

    ``x + eta + alpha * sign(gradient at x + eta)`` with ``eta`` uniform in ``[-noise * eps, noise * eps]``, both kept
    in the pixel box. The result may be ``(noise + step) * eps`` away (see :attr:`reach`): this is a *training*
    attack, to be evaluated with another one. It exists for linf only.

    Args:
        threat: The ball (linf) and the pixel space.
        noise: Noise radius in multiples of eps.
        step: Step size in multiples of eps.
        objective: As in :class:`~lightning_robust.attacks.PGD`.

    Raises:
        ValueError: If the norm is not linf, noise is negative or the step is not positive.

    Example:
        >>> import torch
        >>> from lightning_robust import ThreatModel
        >>> w = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        >>> attack = NFGSM(ThreatModel("linf", eps=0.1), noise=0.0)
        >>> attack(lambda x: x @ w, torch.full((1, 2), 0.5), torch.tensor([0]))
        tensor([[0.4000, 0.6000]])

    References:
        de Jorge et al., `Make Some Noise: Reliable and Efficient Single-Step Adversarial Training
        <https://arxiv.org/abs/2202.01181>`_, 2022, algorithm 1.
    """

    threat: Threat
    noise: float = 2.0
    step: float = 1.0
    objective: str | Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if self.threat.norm != "linf":
            raise ValueError(
                f"NFGSM is defined for norm 'linf', got {self.threat.norm!r}; use PGD(threat, steps=2) instead."
            )
        if self.noise < 0 or not self.step > 0:
            raise ValueError(f"NFGSM needs noise >= 0 and step > 0, got noise={self.noise}, step={self.step}.")
        check_objective(self.objective)

    @property
    def reach(self) -> float:
        """The largest distance from the clean input, in pixel units."""
        return (self.noise + self.step) * self.threat.eps

    @property
    def name(self) -> str:
        """Short name for log keys: ``nfgsm_linf_0.2``."""
        return f"nfgsm_{self.threat}"

    def __call__(self, logits_fn: LogitsFn, x: Tensor, y: Tensor, *, generator: Noise = None) -> Tensor:
        """Perturb ``x`` (model inputs, ``(N, ...)``) against targets ``y``; the result has the type of ``x``.

        Raises:
            ValueError: If ``x`` lies outside the pixel space.
        """
        with searching(self.threat, logits_fn, x, y, self.objective, generator) as search:
            noise = search.threat.noise(search.clean, generator)
            noisy = clamped(search.clean + self.noise * noise, search.box)
            gradient, _, _ = search.climb(noisy)
            step = self.step * self.threat.eps * search.uphill(gradient)
            return search.threat.pixels.to_model(clamped(noisy + step, search.box), x.dtype)
