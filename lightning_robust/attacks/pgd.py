"""Projected gradient descent (FGSM is one step of it)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_robust.attacks.heads import check_objective
from lightning_robust.attacks.joint import Threat
from lightning_robust.attacks.search import Search, searching, worst_of
from lightning_robust.attacks.targets import Targets, check_targets, towards
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
        objective: What is climbed: ``"cross_entropy"``, ``"margin"``, ``"dlr"``, ``"kl"`` (away from the clean
            prediction), or a function ``(logits, y) -> (N,)``. ``None``: the loss that the user's own step calls where
            a callback runs the attack, else cross-entropy.
        targeted: Which class to reach, instead of any wrong one: ``"random"``, ``"least-likely"`` or ``"runner-up"``,
            chosen by the clean prediction among the wrong classes, or ``"given"``: ``y`` holds the classes to reach.
        keep: ``"last"`` iterate (what published recipes train on), or the ``"best"`` one a sample by its margin, which
            is the stronger attack. ``None``: the best where :class:`~lightning_robust.RobustAccuracy` evaluates, else
            the last.
        early_exit: Leave samples alone once they are fooled, with ``keep="best"``: the same robust accuracy for less
            work. Not for training, where it is another method (friendly adversarial training).

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
    objective: str | Callable[..., Any] | None = None
    targeted: Targets | None = None
    keep: Literal["last", "best"] | None = None
    early_exit: bool | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"PGD({name}=) must be at least 1, got {getattr(self, name)}.")
        if self.start not in (None, "uniform", "zero", "gaussian"):
            raise ValueError(f"PGD(start=) must be 'uniform', 'zero', 'gaussian' or None, got {self.start!r}.")
        if self.keep not in (None, "last", "best") or (self.early_exit and self.keep == "last"):
            raise ValueError(
                f"PGD(keep=) must be 'best', 'last' or None, and 'best' with early_exit=True (a sample that is left "
                f"alone keeps its best iterate), got keep={self.keep!r}, early_exit={self.early_exit}."
            )
        check_objective(self.objective)
        check_targets(self.targeted)
        if (
            self.targeted is not None
            and self.objective not in (None, "cross_entropy")
            and not hasattr(self.objective, "head")
        ):
            raise ValueError(
                f"PGD(targeted={self.targeted!r}) climbs the cross-entropy towards a class, and would not use "
                f"objective={self.objective!r}. Leave it out, or use APGD(targets=) for the targeted DLR."
            )
        if self.early_exit and self.keep is None:
            object.__setattr__(self, "keep", "best")
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
    def name(self) -> str:
        """Short and unique for the settings that matter, for log keys: ``pgd20x2_linf_0.2``."""
        restarts = f"x{self.restarts}" if self.restarts > 1 else ""
        kind = "" if self.targeted is None else f"_{self.targeted}"
        climbs = f"_{self.objective}" if isinstance(self.objective, str) else ""
        return f"pgd{self.steps}{restarts}{climbs}{kind}_{self.threat}"

    def __call__(self, logits_fn: LogitsFn, x: Tensor, y: Tensor, *, generator: Noise = None) -> Tensor:
        """Perturb ``x`` (model inputs, ``(N, ...)``) against targets ``y``; the result has the type of ``x``.

        Raises:
            ValueError: If ``x`` lies outside the pixel space.
        """
        with searching(self.threat, logits_fn, x, y, self.objective, generator) as search:
            if self.targeted is not None:
                search = replace(search, objective=towards(self.targeted, search))
            best = worst_of([search] * self.restarts, self._from_one_start, bool(self.early_exit))
            return search.threat.pixels.to_model(best, x.dtype)

    def _from_one_start(self, search: Search) -> tuple[Tensor, Tensor | None]:
        """Pixels, and their margins where those are known."""
        step = 2.5 * self.threat.eps / self.steps if self.step_size is None else self.step_size
        pixels = self._start(search)
        if self.keep != "best":
            for _ in range(self.steps):
                gradient, _, _ = search.climb(pixels)
                pixels = search.project(pixels + step * search.uphill(gradient))
            return pixels, None
        best, rows = pixels.clone(), torch.arange(len(pixels), device=pixels.device)
        worst = torch.full((len(pixels),), -torch.inf, dtype=torch.float32, device=pixels.device)
        for number in range(self.steps + 1):
            if number < self.steps:
                gradient, _, logits = search.climb(pixels)
                score = search.margin(logits)
            else:  # the last iterate is one as well
                score = search.look(pixels)[1]
            better = score > worst[rows]
            best[rows[better]], worst[rows[better]] = pixels[better], score[better]
            if number == self.steps:
                break
            if self.early_exit and search.divisible:
                holds = (score <= 0).nonzero().squeeze(1)
                if not len(holds):
                    break
                if len(holds) < len(rows):
                    rows, pixels, gradient, search = rows[holds], pixels[holds], gradient[holds], search.at(holds)
            pixels = search.project(pixels + step * search.uphill(gradient))
        return best, worst

    def _start(self, search: Search) -> Tensor:
        if self.start == "zero":
            return search.clean
        if self.start == "gaussian":
            return search.project(search.clean + search.threat.jitter(search.clean, search.noise))
        return search.start()
