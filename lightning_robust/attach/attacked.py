"""One evaluation batch under attacks: each on the samples that need it, on random numbers that belong to the sample."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attach.reading import Reading
from lightning_robust.losses import LossCall
from lightning_robust.randomness import seeded

__all__ = ["AttackedBatch", "at_radius"]


@dataclass(frozen=True, eq=False)
class AttackedBatch:
    """A batch that is read, and what attacks make of it.

    Attributes:
        reading: The batch.
        clean: What the model says of it as it is.
        index: Number of each sample among all samples, ``(N,)``.
        seed: Of the attacks' random numbers, which are a function of (seed, index).
        to_the_end: Whether attacks go on with samples that are fooled already.
    """

    reading: Reading
    clean: LossCall
    index: Tensor
    seed: int
    to_the_end: bool

    @property
    def single(self) -> bool:
        """Whether a sample is one prediction: right or wrong, and done with once it is wrong."""
        return self.clean.labels().numel() == len(self.reading.x)

    def run(self, attack: Any, holds: Tensor | None = None) -> tuple[Tensor, LossCall]:
        """The attacked inputs, and what the model says of them.

        Args:
            attack: Any attack.
            holds: Which samples are still right, ``(N,)``; by default those that are right as they are.
        """
        # Where a batch is not taken apart (a sharded model), no process may run fewer forwards than another.
        early = not self.to_the_end and self.reading.divisible
        right = self.clean.correct() > 0
        if not early or (holds is None and not bool(right.any())):  # an attack that does not work shows at once
            holds = torch.ones_like(right)
        rows = (right if holds is None else holds).nonzero().squeeze(1).to(self.reading.x.device)
        perturbed = self._perturbed(attack, rows, early) if len(rows) else self.reading.x
        with torch.no_grad():
            return perturbed, self.reading.read(perturbed)

    def _perturbed(self, attack: Any, rows: Tensor, early: bool) -> Tensor:
        whole = len(rows) == len(self.reading.x)
        part = self.reading if whole else self.reading.at(rows)
        fitted = part.fitted(attack, lambda threat: threat.widened(), keep="best", early_exit=early)
        index, target = self.index.tolist(), self.clean.target
        if not whole:
            index, target = [index[i] for i in rows.tolist()], target[rows]
        noise = [seeded(self.seed, i) for i in index]
        found = part.guarded(fitted)(part.logits, part.x, target, generator=noise)
        if whole:
            return found
        perturbed = self.reading.x.clone()
        perturbed[rows] = found
        return perturbed

    def radii(self, attack: Any, perturbed: Tensor, attacked: LossCall) -> Tensor | None:
        """How far each sample was moved where that fooled it, ``(N,)`` doubles, else infinity; in pixel units."""
        threat = getattr(attack, "threat", None)
        if threat is None:
            return None
        threat = self.reading.threat(threat)
        space = threat.pixels
        far = threat.distance(space.to_pixels(perturbed), space.to_pixels(self.reading.x)).double().cpu()
        return far.masked_fill(attacked.correct().cpu() > 0, torch.inf)


def at_radius(attack: Any, radius: float) -> Any:
    """The same attack at another radius; its step in proportion."""
    if hasattr(attack, "attacks"):  # the worst case of several
        return replace(attack, attacks=tuple(at_radius(part, radius) for part in attack.attacks))
    threat = replace(attack.threat, eps=radius)
    if getattr(attack, "step_size", None) is None:
        return replace(attack, threat=threat)
    return replace(attack, threat=threat, step_size=attack.step_size * radius / attack.threat.eps)
