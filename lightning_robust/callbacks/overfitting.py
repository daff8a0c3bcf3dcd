"""The alarm for overfitting to an attack: one that trains on a single step may defend against that step alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from lightning_robust.attach.probe import Probe
from lightning_robust.attach.step import Step
from lightning_robust.attacks import FGSM, PGD, JointThreat, ThreatModel
from lightning_robust.attacks.methods import STEP_COST
from lightning_robust.callbacks.held_batch import HeldBatch

__all__ = ["CATASTROPHIC", "OverfittingAlarm"]

STEPS = 10  # of the attack that tells

CATASTROPHIC = 0.3
"""Of PGD accuracy over FGSM accuracy. On digits at linf 0.3 networks that fell to catastrophic overfitting lay below
0.12 on test data, and between 0.1 and 0.4 on the batch they were trained on; sound ones above 0.6 on both. A difference
would not do: 18 points are normal there."""

SHARE = 0.05
"""Of the cost of training, that the alarm may add."""

LEARNT, ABOVE_CHANCE = 0.3, 1.5
"""FGSM accuracy from which on a network can have collapsed: as a share of clean accuracy, in multiples of chance."""


class OverfittingAlarm:
    """Attacks the last training batch of an epoch: of every one where they are long enough, and of the last.

    Args:
        react: ``"warn"``, ``"switch"`` or ``"ignore"``.
        threat: Of the training attack; None where it has none of ours.
        one_step: Whether training takes a single step.
        cost: Of a training step, in multiples of a clean one.
        seed: Of the attacks.

    Attributes:
        collapsed: Whether the alarm has gone off.
        every: After so many batches attacking one more costs :data:`SHARE` of them.
    """

    def __init__(
        self, react: str, threat: ThreatModel | JointThreat | None, one_step: bool, cost: float, seed: int
    ) -> None:
        self.react, self.threat, self.one_step = react, threat, one_step
        self.every = math.ceil(STEP_COST * (STEPS + one_step) / (SHARE * cost))
        self.collapsed = False
        self.held = HeldBatch(seed)

    @property
    def listens(self) -> bool:
        """Whether there is anything to measure."""
        return self.react != "ignore" and self.threat is not None

    @property
    def remedy(self) -> PGD | None:
        """The attack that takes over from here on."""
        if self.collapsed and self.react == "switch" and self.threat is not None:
            return PGD(self.threat, steps=STEPS)
        return None

    def due(self, trainer: Any) -> bool:
        """Whether this epoch ends with a measurement; a function of its number alone, so that resumed runs agree."""
        if not self.listens:
            return False
        epoch, batches = trainer.current_epoch, trainer.num_training_batches
        if batches == float("inf") or trainer.max_steps > 0 or epoch + 1 == trainer.max_epochs:
            return True
        return bool((epoch + 1) * batches // self.every > epoch * batches // self.every)

    def hold(self, trainer: Any, step: Step, samples: int) -> None:
        """A batch that may be the last of its epoch."""
        if self.due(trainer):
            self.held.keep(step, samples)

    def measure(self, trainer: Any, probe: Probe, who: Any, grown: bool) -> dict[str, float]:
        """Accuracies at the end of an epoch, to be logged; goes off where they say so.

        Args:
            trainer: Of this run.
            probe: Reads the batch.
            who: Named in the warning.
            grown: Whether training is at the whole radius.
        """
        if self.threat is None:
            return {}
        attacks: dict[str, Any] = {"accuracy": PGD(self.threat, steps=STEPS)}
        if self.one_step:
            attacks["fgsm_accuracy"] = FGSM(self.threat)
        values = self.held.accuracies(trainer, probe, attacks)
        self.held.forget()
        if values and self.one_step:
            values["pgd_to_fgsm"] = values["accuracy"] / max(values["fgsm_accuracy"], 1e-9)
            # What has not learnt to defend against one step yet, or not at this radius, cannot have overfitted to it.
            least = max(LEARNT * values["held_clean_accuracy"], ABOVE_CHANCE * self.held.chance, 1e-9)
            learnt = values["fgsm_accuracy"] >= least
            if grown and learnt and values["pgd_to_fgsm"] < CATASTROPHIC and not self.collapsed:
                self._go_off(trainer, who, values)
        values.pop("held_clean_accuracy", None)
        return values

    def _go_off(self, trainer: Any, who: Any, values: Mapping[str, float]) -> None:
        self.collapsed = True
        remedy = (
            "PGD with 10 steps takes over from here"
            if self.react == "switch"
            else "overfitting='switch' goes over to PGD; method='n-fgsm' or a smaller radius delays it"
        )
        warnings.warn(
            f"{who}: catastrophic overfitting in epoch {trainer.current_epoch}: on a training batch "
            f"{values['fgsm_accuracy']:.0%} are right under FGSM but {values['accuracy']:.0%} under PGD-10. The "
            f"network defends against one step alone; keep a checkpoint from before. {remedy}.",
            stacklevel=2,
        )
