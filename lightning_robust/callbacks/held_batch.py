"""A training batch that is attacked at the end of every epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lightning_robust.attach.batches import copied, rebuilt
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.step import Step
from lightning_robust.randomness import seeded

__all__ = ["HeldBatch"]


class HeldBatch:
    """The last batch of an epoch, of the largest ones: a run that is resumed in mid-epoch meets it as well.

    Args:
        seed: Of the attacks' random starts, which are the same in every epoch.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.chance = 0.0  # accuracy of a guess, known once something was measured
        self._step: Step | None = None
        self._samples = 0

    def keep(self, step: Step, samples: int) -> None:
        """Hold on to a copy of a step's batch: the step may write into its own."""
        if samples >= self._samples:
            self._step, self._samples = step.with_batch(rebuilt(step.batch, {}, copied)), samples

    def forget(self) -> None:
        """Hold nothing of an epoch that is over."""
        self._step, self._samples = None, 0

    def accuracies(self, trainer: Any, probe: Probe, attacks: Mapping[str, Any]) -> dict[str, float]:
        """Share of right answers, clean and under each attack, over all processes, in full precision and eval mode."""
        if self._step is None:
            return {}
        right = torch.zeros(2 + len(attacks), dtype=torch.float64)
        no_autocast = torch.autocast(trainer.strategy.root_device.type, enabled=False)
        context = trainer.precision_plugin.val_step_context()
        with context, no_autocast, probe.reading(self._step) as reading:
            right[-1] = len(reading.x)
            with torch.no_grad():
                clean = reading.read(reading.x)
            right[-2] = clean.correct().sum().cpu()
            self.chance = 1 / clean.log_probabilities().shape[1]
            for row, attack in enumerate(attacks.values()):
                fitted = reading.fitted(attack, lambda threat: threat.widened())
                noise = seeded(self.seed, trainer.global_rank)
                found = reading.guarded(fitted)(reading.logits, reading.x, reading.y, generator=noise)
                with torch.no_grad():
                    right[row] = reading.read(found).correct().sum().cpu()
        if trainer.world_size > 1:
            right = trainer.strategy.reduce(right.to(trainer.strategy.root_device), reduce_op="sum").cpu()
        names = [*attacks, "held_clean_accuracy"]
        return {name: float(count / right[-1]) for name, count in zip(names, right, strict=False)}
