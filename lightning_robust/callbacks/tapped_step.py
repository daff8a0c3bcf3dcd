"""Features of the user's own evaluation step: caught while Lightning runs it."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch

from lightning_robust.attach.features import Caught, Tapped
from lightning_robust.attach.listener import Heard, step_context
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.callbacks.detecting import Detecting

__all__ = ["TappedStep"]


class TappedStep:
    """One step at a time.

    Args:
        detecting: Whose features these are; None where nobody wants any.
    """

    def __init__(self, detecting: Detecting | None) -> None:
        self.detecting = detecting
        self._listening = ExitStack()
        self._tapped: Tapped | None = None
        self._step: Step | None = None  # that is listened to

    def open(self, step: Step) -> None:
        """Catch what goes into the last layer from now on, once detectors are fitted."""
        if self.detecting is not None and self.detecting.fitted:
            self._step, self._tapped = step, self._listening.enter_context(self.detecting.listen(step.module))

    def close(self) -> None:
        """Leave no hook behind."""
        self._listening.close()
        self._tapped = self._step = None

    def caught(self, trainer: Any, probe: Probe, heard: Heard, stage: str) -> Caught | None:
        """The features of what was heard; None where there are none."""
        if self._tapped is None:
            return None
        caught = self._tapped.of(heard.call)
        return self._caught_again(trainer, probe, heard, stage) if caught is None else caught

    def _caught_again(self, trainer: Any, probe: Probe, heard: Heard, stage: str) -> Caught | None:
        """One more forward where the running step shows no features: another step stands in for it."""
        if self._step is None or self.detecting is None:
            return None
        step = self._step
        with suppress(ProbeError), step_context(trainer, stage), torch.no_grad(), ExitStack() as stack:
            # As the loop runs it: whoever keeps dropout on in validation is measured with it.
            reading = stack.enter_context(probe.reading(step, training=None, listening=True))
            return self.detecting.read(step.module, partial(reading.read, heard.x))[1]
        return None
