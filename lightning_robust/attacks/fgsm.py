"""FGSM and FGSM-RS: one gradient step, from the input itself or from a random start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lightning_robust.attacks.heads import check_objective
from lightning_robust.attacks.joint import Threat
from lightning_robust.attacks.search import searching
from lightning_robust.protocols import LogitsFn
from lightning_robust.randomness import Noise

__all__ = ["FGSM"]


@dataclass(frozen=True)
class FGSM:
    """One step along the gradient's sign (l2: its direction), projected back into the ball.

    From the input itself it is FGSM, from a random start FGSM-RS. Both are *training* attacks, and both can overfit
    catastrophically: the network learns to defend against this one step and against nothing else
    (:class:`~lightning_robust.AdversarialTraining` watches for that). N-FGSM is the safer one-step method.

    Args:
        threat: The ball and the pixel space.
        start: ``"zero"`` or ``"uniform"`` in the ball.
        step: Step size in multiples of eps; by default 1 from the input itself and 1.25 from a random start.
        objective: As in :class:`~lightning_robust.attacks.PGD`.

    Raises:
        ValueError: If the start is unknown or the step is not positive.

    Example:
        >>> import torch
        >>> from lightning_robust import ThreatModel
        >>> w = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        >>> FGSM(ThreatModel("linf", eps=0.1))(lambda x: x @ w, torch.full((1, 2), 0.5), torch.tensor([0]))
        tensor([[0.4000, 0.6000]])

    References:
        Goodfellow et al., `Explaining and Harnessing Adversarial Examples <https://arxiv.org/abs/1412.6572>`_, 2015.
        Wong et al., `Fast is better than free <https://arxiv.org/abs/2001.03994>`_, 2020 (the random start).
    """

    threat: Threat
    start: Literal["zero", "uniform"] = "zero"
    step: float | None = None
    objective: str | Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if self.start not in ("zero", "uniform"):
            raise ValueError(f"FGSM(start=) must be 'zero' or 'uniform', got {self.start!r}.")
        if self.step is not None and not self.step > 0:
            raise ValueError(f"FGSM(step=) is in multiples of eps and must be positive, got {self.step}.")
        check_objective(self.objective)

    @property
    def name(self) -> str:
        """Short name for log keys: ``fgsm_linf_0.2``, ``fgsm-rs_linf_0.2``."""
        return f"fgsm{'-rs' * (self.start == 'uniform')}_{self.threat}"

    def __call__(self, logits_fn: LogitsFn, x: Tensor, y: Tensor, *, generator: Noise = None) -> Tensor:
        """Perturb ``x`` (model inputs, ``(N, ...)``) against targets ``y``; the result has the type of ``x``.

        Raises:
            ValueError: If ``x`` lies outside the pixel space.
        """
        step = (1.25 if self.start == "uniform" else 1.0) if self.step is None else self.step
        with searching(self.threat, logits_fn, x, y, self.objective, generator) as search:
            pixels = search.clean if self.start == "zero" else search.start()
            gradient, _, _ = search.climb(pixels)
            moved = search.project(pixels + step * self.threat.eps * search.uphill(gradient))
            return search.threat.pixels.to_model(moved, x.dtype)
