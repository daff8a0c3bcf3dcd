"""Auto-PGD: projected gradient ascent with momentum whose step size is chosen by how the ascent goes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attacks.heads import OnHead, check_objective, head_of
from lightning_robust.attacks.joint import Threat
from lightning_robust.attacks.objectives import targeted_dlr
from lightning_robust.attacks.search import Search, searching, worst_of
from lightning_robust.attacks.targets import likeliest_wrong
from lightning_robust.attacks.threat import per_sample
from lightning_robust.protocols import LogitsFn
from lightning_robust.randomness import Noise

__all__ = ["APGD"]

MOMENTUM = 0.75  # weight of the new step; the rest goes on where the last one went


@dataclass(frozen=True)
class APGD:
    """Auto-PGD, an attack for evaluation that needs no step size.

    It starts on the surface of the ball with steps of ``2 eps``, keeps momentum, and at checkpoints halves a sample's
    step and goes back to its best point if too few steps went up or nothing better was found. Of every sample the
    iterate with the largest margin is returned; samples that are wrong already are left alone.

    Args:
        threat: The ball and the pixel space.
        steps: Gradient steps a run.
        restarts: Independent runs (each, for every target).
        objective: As in :class:`~lightning_robust.attacks.PGD`; ``"cross_entropy"`` is APGD-CE, ``"dlr"`` is APGD-DLR.
        targets: APGD-T: one run towards each of so many likeliest wrong classes (9 in AutoAttack, or all there are),
            climbing the targeted DLR; takes the place of ``objective``.
        rho: Share of the steps between two checkpoints that must go up.
        early_exit: Leave samples alone once they are fooled: the same robust accuracy for less work. ``None``: yes,
            unless a callback measures more than accuracy.

    Raises:
        ValueError: If a number is out of its range, or both an objective and targets are given.

    Example:
        >>> from lightning_robust import ThreatModel
        >>> w = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        >>> x, y = torch.full((1, 2), 0.6), torch.tensor([0])
        >>> APGD(ThreatModel("linf", eps=0.1), steps=10, early_exit=False)(lambda x: x @ w + 0.1 * x, x, y)
        tensor([[0.5000, 0.7000]])

    References:
        Croce and Hein, `Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks <https://arxiv.org/abs/2003.01690>`_, 2020, algorithm 1.
    """

    threat: Threat
    steps: int = 100
    restarts: int = 1
    objective: str | Callable[..., Any] | None = None
    targets: int | None = None
    rho: float = 0.75
    early_exit: bool | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"APGD({name}=) must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.rho < 1:
            raise ValueError(f"APGD(rho=) is a share between 0 and 1, got {self.rho}.")
        other = self.objective is not None and not hasattr(self.objective, "head")
        if self.targets is not None and (self.targets < 1 or other):
            raise ValueError(
                f"APGD(targets=) is a number of classes from 1 on and brings its own objective (targeted DLR), got "
                f"targets={self.targets}, objective={self.objective!r}."
            )
        check_objective(self.objective)

    @property
    def name(self) -> str:
        """Short name for log keys: ``apgd100_dlr_linf_0.2``, ``apgd100_t9_linf_0.2``."""
        restarts = f"x{self.restarts}" if self.restarts > 1 else ""
        climbs = f"_{self.objective}" if isinstance(self.objective, str) else ""
        return f"apgd{self.steps}{restarts}{climbs}{f'_t{self.targets}' if self.targets else ''}_{self.threat}"

    def __call__(self, logits_fn: LogitsFn, x: Tensor, y: Tensor, *, generator: Noise = None) -> Tensor:
        """Perturb ``x`` (model inputs, ``(N, ...)``) against targets ``y``; the result has the type of ``x``.

        Raises:
            ValueError: If ``x`` lies outside the pixel space.
        """
        with searching(self.threat, logits_fn, x, y, self.objective, generator) as search:
            runs = [search] if self.targets is None else self._targeted(search)
            best = worst_of(runs * self.restarts, self._run, self.early_exit is not False, known=search.clean)
            return search.threat.pixels.to_model(best, x.dtype)

    def _targeted(self, search: Search) -> list[Search]:
        """The same search towards each of the likeliest wrong classes."""
        owner = search.objective if hasattr(search.objective, "head") else None
        with torch.no_grad():
            logits, right = head_of(owner)(search.logits(search.clean), search.y)
        wrong = likeliest_wrong(logits, right, min(self.targets or 1, logits.shape[1] - 1))
        return [replace(search, objective=OnHead(_TowardsByDLR(wrong[:, k]), owner)) for k in range(wrong.shape[1])]

    def _run(self, search: Search) -> tuple[Tensor, Tensor]:
        checkpoints, state = _checkpoints(self.steps), _Ascent.begin(search)
        rows, best, worst = torch.arange(len(search.y)), state.x.clone(), state.score.clone()
        since = 0
        for k in range(self.steps):
            if self.early_exit is not False and search.divisible and bool((state.score > 0).any()):
                holds = (state.score <= 0).nonzero().squeeze(1)
                if not len(holds):
                    break
                rows, search, state = rows[holds.cpu()], search.at(holds), state.at(holds)
            state.step(search, 1.0 if k == 0 else MOMENTUM, last=k == self.steps - 1)
            better = (state.score > worst[rows]).cpu()
            best[rows[better]], worst[rows[better]] = state.x[better], state.score[better]
            if k + 1 in checkpoints:
                state.halve(self.rho * (k + 1 - since))
                since = k + 1
        return best, worst


@dataclass(frozen=True)
class _TowardsByDLR:
    target: Tensor

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        return targeted_dlr(logits, (y.argmax(1) if y.shape == logits.shape else y).long(), self.target)

    def at(self, rows: Tensor) -> _TowardsByDLR:
        return _TowardsByDLR(self.target[rows])


@dataclass
class _Ascent:
    """Where every sample is, where it was best, and how long its next step is."""

    x: Tensor
    previous: Tensor
    gradient: Tensor
    value: Tensor
    score: Tensor
    best_x: Tensor
    best_gradient: Tensor
    best_value: Tensor
    step_size: Tensor
    ups: Tensor
    value_at_checkpoint: Tensor
    halved: Tensor

    @classmethod
    def begin(cls, search: Search) -> _Ascent:
        eps, clean = search.threat.eps, search.clean
        noise = search.threat.noise(clean, search.noise)
        # On the surface: as far as the ball allows in the direction of a random point of it.
        length = search.threat.distance(clean + noise, clean).clamp_min(torch.finfo(clean.dtype).tiny)
        x = search.project(clean + noise * per_sample(eps / length, clean))
        gradient, value, logits = search.climb(x)
        n = len(x)
        return cls(
            *(x, x, gradient, value, search.margin(logits)),
            *(x, gradient, value),
            *(x.new_full((n,), 2 * eps), x.new_zeros(n), value, torch.zeros(n, dtype=torch.bool, device=x.device)),
        )

    def at(self, rows: Tensor) -> _Ascent:
        return _Ascent(*(value[rows] for value in vars(self).values()))

    def step(self, search: Search, weight: float, last: bool) -> None:
        """One step with momentum."""
        size = per_sample(self.step_size, self.x)
        ahead = search.project(self.x + size * search.uphill(self.gradient))
        moved = search.project(self.x + weight * (ahead - self.x) + (1 - weight) * (self.x - self.previous))
        self.previous, self.x, before = self.x, moved, self.value
        if last:
            self.value, self.score = search.look(self.x)
            return
        self.gradient, self.value, logits = search.climb(self.x)
        self.score = search.margin(logits)
        self.ups = self.ups + (self.value > before)
        better = self.value > self.best_value
        rows = per_sample(better, self.x)
        self.best_x = torch.where(rows, self.x, self.best_x)
        self.best_gradient = torch.where(rows, self.gradient, self.best_gradient)
        self.best_value = torch.where(better, self.value, self.best_value)

    def halve(self, enough: float) -> None:
        """At a checkpoint: who gets nowhere goes back to its best point with half the step."""
        stuck = ~self.halved & (self.best_value == self.value_at_checkpoint)
        halve = (self.ups <= enough) | stuck
        self.step_size = torch.where(halve, self.step_size / 2, self.step_size)
        rows = per_sample(halve, self.x)
        self.x = torch.where(rows, self.best_x, self.x)
        self.gradient = torch.where(rows, self.best_gradient, self.gradient)
        self.value = torch.where(halve, self.best_value, self.value)
        self.halved, self.value_at_checkpoint, self.ups = halve, self.best_value, torch.zeros_like(self.ups)


def _checkpoints(steps: int) -> set[int]:
    """After which steps the step sizes are looked at: wide apart at first, closer and closer."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    # Rounded first: 0.7 of 100 steps is 70, whatever its last bit says.
    return {math.ceil(round(share * steps, 6)) for share in shares[1:] if share < 1}
