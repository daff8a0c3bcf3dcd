"""One attack on one batch: its pixels, their box, what is climbed, and which samples are still searched."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attacks.heads import margin_of, narrowed, objective_named
from lightning_robust.attacks.joint import JointThreat
from lightning_robust.attacks.local import LocalThreat
from lightning_robust.attacks.threat import ThreatModel
from lightning_robust.modes import gradients
from lightning_robust.pixels import Box
from lightning_robust.protocols import LogitsFn
from lightning_robust.randomness import Noise, normal

__all__ = ["HALF_SCALE", "Search", "noise_of", "searching", "worst_of"]

HALF_SCALE = 2.0**10
"""What keeps gradients of confident samples above zero in half precision; a power of two, which rounds nothing."""


@dataclass(frozen=True, eq=False)
class Search:
    """What an attack works with. All tensors are pixels, batch first, and have no graph.

    Attributes:
        threat: Ball and pixel space.
        logits_fn: Model inputs to logits.
        objective: What is climbed, ``(logits, y) -> (N,)``.
        y: The targets.
        clean: The inputs as they are.
        box: Where pixels may lie.
        noise: One generator, or one a sample.
        dtype: Of the model's inputs.
    """

    threat: ThreatModel | JointThreat | LocalThreat
    logits_fn: LogitsFn
    objective: Any
    y: Tensor
    clean: Tensor
    box: Box
    noise: Noise
    dtype: torch.dtype

    def logits(self, pixels: Tensor) -> Tensor:
        """What the model says of these pixels."""
        return self.logits_fn(self.threat.pixels.to_model(pixels, self.dtype))

    def look(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Objective and margin at ``pixels``, ``(N,)`` each, without gradients."""
        with torch.no_grad():
            logits = self.logits(pixels)
            return self.objective(logits, self.y), self.margin(logits)

    def margin(self, logits: Tensor) -> Tensor:
        """How far the wrong answer lies above the right one, ``(N,)``."""
        with torch.no_grad():
            found = margin_of(self.objective)(logits.detach(), self.y).float()
            return found.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)  # no answer is a wrong one

    def climb(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of the objective by the pixels, the objective itself ``(N,)``, and the logits.

        The gradient is that of the sum, not of the mean: a sample's gradient then does not depend on the batch size.

        Raises:
            RuntimeError: If the logits do not depend on the input.
        """
        pixels = pixels.detach().requires_grad_()
        logits = self.logits(pixels)
        value = self.objective(logits, self.y)
        if not bool(value.isfinite().all()) and bool(pixels.isfinite().all()):
            warnings.warn(
                "the loss of some samples is NaN or infinite where an attack climbs it: there it goes at random, and "
                "accuracy under it looks better than it is. Attack the margin as well (objective='margin'), in fp32.",
                stacklevel=2,
            )
        half = logits.dtype == torch.float16
        # autograd.grad, not backward(): the parameters' own gradients must stay as they are.
        total = value.sum() * HALF_SCALE if half else value.sum()
        (gradient,) = torch.autograd.grad(total, pixels, allow_unused=True) if total.requires_grad else (None,)
        if gradient is None:
            raise RuntimeError(
                "the logits do not depend on the input: no gradient reaches it. Is the network (or a frozen backbone) "
                "run under torch.no_grad(), or is the output detached?"
            )
        return gradient.nan_to_num(0.0) / HALF_SCALE if half else gradient, value.detach(), logits.detach()

    def uphill(self, gradient: Tensor) -> Tensor:
        """The unit step that climbs fastest; in a random direction where the gradient is exactly zero."""
        step = self.threat.steepest(gradient)
        # Of the step, not of the gradient, which may be left outside of a mask alone.
        still = (step.flatten(1).abs().amax(1) == 0).nonzero().squeeze(1)
        if len(still):
            # They draw for themselves alone: what others draw later must not depend on who is in the batch.
            drawn = normal(gradient[still], noise_of(self.noise, still))
            step = step.index_copy(0, still, narrowed(self.threat, still).steepest(drawn))
        return step

    def project(self, pixels: Tensor) -> Tensor:
        """The nearest point of ball and box."""
        return self.threat.project(pixels, self.clean, self.box)

    def start(self) -> Tensor:
        """A uniformly distributed point of each ball, moved into the box."""
        return self.threat.random_start(self.clean, self.box, self.noise)

    def at(self, rows: Tensor) -> Search:
        """The same search for some samples (indices); the rest of the batch is left alone.

        Where a batch cannot be taken apart (its rows refer to each other), callers are given it whole: see
        :attr:`divisible`.
        """
        low, high = self.box
        box = (low[rows], high[rows]) if isinstance(low, Tensor) and isinstance(high, Tensor) else self.box
        return replace(
            self,
            threat=narrowed(self.threat, rows),
            logits_fn=narrowed(self.logits_fn, rows),
            objective=narrowed(self.objective, rows),
            y=self.y[rows],
            clean=self.clean[rows],
            box=box,
            noise=noise_of(self.noise, rows),
        )

    @property
    def divisible(self) -> bool:
        """Whether samples can be searched apart from each other."""
        return bool(getattr(self.logits_fn, "divisible", True))


def noise_of(noise: Noise, rows: Tensor) -> Noise:
    """The generators of some samples."""
    return [noise[i] for i in rows.tolist()] if isinstance(noise, Sequence) else noise


def worst_of(
    searches: Iterable[Search],
    run: Callable[[Search], tuple[Tensor, Tensor | None]],
    early_exit: bool,
    known: Tensor | None = None,
) -> Tensor:
    """Several runs on one batch; of each sample the perturbation with the largest margin.

    Args:
        searches: One for each run, all on the same batch.
        run: Searches once and returns pixels, and their margins if it knows them.
        early_exit: Whether a run is given only the samples that still hold, where a batch can be taken apart.
        known: Pixels to begin with, e.g. the clean ones.
    """
    best, worst = known, None
    for search in searches:
        if best is None:
            best, worst = run(search)
            continue
        worst = search.look(best)[1] if worst is None else worst
        rows = torch.arange(len(best), device=best.device)
        if early_exit and search.divisible:
            rows = (worst <= 0).nonzero().squeeze(1)
            if not len(rows):
                break
        part = search if len(rows) == len(best) else search.at(rows)
        found, score = run(part)
        score = part.look(found)[1] if score is None else score
        better = score > worst[rows]
        best, worst = best.clone(), worst.clone()
        best[rows[better]], worst[rows[better]] = found[better], score[better]
    if best is None:
        raise ValueError("worst_of takes one search or more, got none.")
    return best


@contextmanager
def searching(
    threat: Any, logits_fn: LogitsFn, x: Tensor, y: Tensor, objective: Any, noise: Noise = None
) -> Iterator[Search]:
    """Open a search on model inputs ``x`` ``(N, ...)``; inside, gradients are on and inference mode is off.

    Args:
        threat: Ball and pixel space.
        logits_fn: Model inputs to logits.
        x: Model inputs.
        y: Targets.
        objective: A function, a name, or None for cross-entropy.
        noise: Random numbers of the attack.

    Raises:
        ValueError: If ``x`` lies outside the pixel space, or targets and radii do not belong to it.
        TypeError: If ``x`` holds whole numbers.
    """
    space = threat.pixels
    _check(threat, x, y, objective)
    with gradients(x, y) as (x, y):
        if space.outside == "raise":
            space.check(x)
        found = objective_named(objective, None, lambda: logits_fn(x), y)
        clean = space.to_pixels(x)
        yield Search(threat, logits_fn, found, y, clean, space.box(clean), noise, x.dtype)


def _check(threat: Any, x: Tensor, y: Tensor, objective: Any) -> None:
    if not x.is_floating_point():
        raise TypeError(
            f"attacks move inputs by fractions, got {x.dtype}. Give x.float() and say what its numbers mean, e.g. "
            "PixelSpace(bounds=(0, 255))."
        )
    radii = threat.radii if isinstance(threat, LocalThreat) else None
    if radii is not None and len(radii) != len(x):
        raise ValueError(f"within(eps=) takes a radius for each of {len(x)} samples, got {len(radii)}.")
    shares = y.is_floating_point() and y.ndim == 2 and y.shape[1] > 1 and not hasattr(objective, "head")
    if shares and bool(((y.sum(1) - 1).abs() > 1e-2).any()):
        raise ValueError(
            f"targets {tuple(y.shape)} whose rows do not sum to 1 are no class probabilities. If each output is a "
            "yes or no of its own (several labels a sample), say so: objective=attacks.YesNo()."
        )
