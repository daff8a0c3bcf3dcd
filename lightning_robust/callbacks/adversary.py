"""The attacked inputs of the batch that is trained on: crafted once, however often they are asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attach.probe import Probe
from lightning_robust.attach.reading import Reading
from lightning_robust.attach.schedule import epochs_done, warm
from lightning_robust.attach.step import Step
from lightning_robust.attacks import PGD, JointThreat, ThreatModel
from lightning_robust.attacks.methods import Method
from lightning_robust.randomness import seeded, uniform

__all__ = ["Adversary"]


class Adversary:
    """Crafts one batch at a time. Random numbers are a function of (seed, rank, step, batch).

    Args:
        method: Decides what is climbed.
        share: Of the samples of a batch that are attacked.
        warmup_epochs: The radius grows from 0 over so many epochs.
        start_epoch: The first epoch that is attacked.
        craft_mode: ``"eval"`` or ``"train"``.
        seed: Of the random numbers.
    """

    def __init__(
        self, method: Method, share: float, warmup_epochs: float, start_epoch: int, craft_mode: str, seed: int
    ) -> None:
        self.method, self.share, self.craft_mode, self.seed = method, share, craft_mode, seed
        self.warmup_epochs, self.start_epoch = warmup_epochs, start_epoch
        self.trainer: Any = None
        self.crafted: Tensor | None = None
        self._batch_idx = 0
        self._warned = False

    def begin(self, trainer: Any) -> None:
        """A new fit."""
        self.trainer, self.crafted, self._warned = trainer, None, False

    def forget(self) -> None:
        """Hold nothing of a fit that is over."""
        self.trainer = self.crafted = None

    def next_batch(self, batch_idx: int) -> None:
        """Another batch: what was crafted belongs to the last one."""
        self._batch_idx, self.crafted = batch_idx, None

    @property
    def active(self) -> bool:
        """Whether this epoch is attacked."""
        return bool(self.trainer.current_epoch >= self.start_epoch)

    @property
    def done(self) -> float:
        """Epochs so far."""
        return epochs_done(self.trainer, self._batch_idx)

    def keys(self) -> tuple[int, ...]:
        """What random numbers of this batch are a function of."""
        return self.seed, self.trainer.global_rank, self.trainer.global_step, self._batch_idx

    def craft(self, step: Step, probe: Probe, attack: Any, first: Callable[[Step, Reading], None]) -> Tensor:
        """The attacked inputs of ``step``.

        Args:
            step: With the batch as it is.
            probe: Reads it.
            attack: What to run.
            first: Called with the first reading of a fit, before anything is crafted.
        """
        if self.crafted is not None:
            return self.crafted
        with probe.reading(step, training=False if self.craft_mode == "eval" else None) as reading:
            first(step, reading)
            noise = seeded(*self.keys())
            part, rows = self._attacked(reading)
            found = part.guarded(self.fitted(attack, part))(part.logits, part.x, part.y, generator=noise)
            self.crafted = found
            if len(rows) < len(reading.x):
                self.crafted = reading.x.detach().clone()
                self.crafted[rows] = found if part is not reading else found[rows]
        return self.crafted

    def _attacked(self, reading: Reading) -> tuple[Reading, Tensor]:
        """The samples that are attacked, and a reading of them alone where that is possible."""
        n = len(reading.x)
        rows = torch.arange(n, device=reading.x.device)
        if self.share == 1:
            return reading, rows
        order = uniform(torch.empty(n), seeded(*self.keys(), 1)).argsort().to(rows.device)
        rows = order[: max(1, round(self.share * n))].sort().values
        return (reading.at(rows) if reading.divisible else reading), rows

    def fitted(self, attack: Any, reading: Reading) -> Any:
        """An attack with the radius of this moment, on the user's own loss."""
        fraction = warm(self.done, self.warmup_epochs, self.start_epoch)
        if self.method == "trades":
            attack = replace(attack, start="gaussian", objective="kl")
        # The first batch was inside the bounds; later ones may overshoot (augmentation) and are counted.
        attack = reading.fitted(attack, lambda threat: threat.scaled(fraction).widened())
        if isinstance(attack, PGD) and attack.step_size is not None:
            attack = replace(attack, step_size=max(attack.step_size * fraction, 1e-12))
        return attack

    def count_outside(self, x: Tensor, space: Any, key: str) -> int:
        """How many inputs leave the bounds; the first time with a warning."""
        outside = int(space.count_outside(x))
        if outside and not self._warned:
            self._warned = True
            warnings.warn(
                f"{outside} of {len(x)} inputs leave the pixel bounds {space.bounds} (augmentation?). They keep their "
                f"own wider bounds and are counted in {key}.",
                stacklevel=2,
            )
        return outside


def threat_of(attack: Any) -> ThreatModel | JointThreat | None:
    """The threat model of an attack, if it has one of ours."""
    threat = getattr(attack, "threat", None)
    return threat if isinstance(threat, (ThreatModel, JointThreat)) else None
