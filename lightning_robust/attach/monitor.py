"""What callbacks that measure in evaluation share: which batches, when, and on which weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attach.base import RobustCallback
from lightning_robust.attach.batches import copied, rebuilt
from lightning_robust.attach.listener import Heard, Listener
from lightning_robust.attach.loaders import evaluation_loaders
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import ProbeError

__all__ = ["Monitor", "suffixes"]


class Monitor(RobustCallback):
    """Hears every evaluation batch and logs at the end of the epoch; the training run does not change by a bit.

    A subclass takes what it needs: :meth:`begin` before the first batch, :meth:`before` and :meth:`hear` around every
    step, :meth:`last` on the last batch (forwards of ours belong between the first and the last batch: in
    ``on_validation_epoch_end`` averaged weights have been swapped out again), :meth:`finish` to compute and log.

    Args:
        area: First part of the log keys.
        name: Tells two callbacks of one class apart.
        probe: How steps are read.
        stages: ``"val"`` (in ``fit`` and ``validate``), ``"test"``, or both.
    """

    def __init__(self, area: str, name: str | None, probe: Probe, stages: Sequence[str]) -> None:
        super().__init__(area, name, probe)
        if isinstance(stages, str) or not stages or not set(stages) <= {"val", "test"}:
            raise ValueError(f"stages= takes a list of 'val', 'test' or both, got {stages!r}.")
        self.stages = tuple(stages)
        self.listener = Listener(probe)
        self._template: Step | None = None
        self._entry: dict[str, Any] = {}  # what the checkpoint gets: of the last validation, or brought by a checkpoint
        self._unreadable = False
        self._warned: set[str] = set()

    @property
    def state_key(self) -> str:
        return f"{super().state_key}{self.stages}"

    def clashes(self, other: RobustCallback) -> bool:
        return bool(set(self.stages) & set(getattr(other, "stages", self.stages)))

    @property
    def label(self) -> str:
        return super().label if len(self.stages) > 1 else f"{super().label}_{self.stages[0]}"

    def section(self) -> Mapping[str, Any]:
        return {self.area: self._entry} if self._entry else {}

    def restore(self, entry: Mapping[str, Any]) -> None:
        self._entry = dict(entry.get(self.area, {}))  # until it is measured again

    # -- for subclasses ------------------------------------------------------------------------------------------

    def begin(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget the last epoch."""

    def before(self, trainer: Any, step: Step, batch_idx: int, loader: int, stage: str) -> None:
        """Before the user's step runs; ``step`` is the one that is listened to."""

    def hear(self, trainer: Any, pl_module: Any, heard: Heard, loader: int, stage: str) -> None:
        """After the user's step ran."""

    def last(self, trainer: Any, template: Step, stage: str) -> None:
        """After the last batch of the first loader, for other inputs, which travel in ``template``."""

    def finish(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """After the last batch of all loaders: compute and log."""

    def record(self, trainer: Any, measured: Mapping[str, Any]) -> None:
        """What checkpoints get from now on, and the step of the weights that it is about."""
        self._entry = {**measured, "measured_step": int(trainer.global_step)} if measured else {}

    def warn_once(self, message: str, about: str = "") -> None:
        """A warning that is not repeated; nor are others ``about`` the same."""
        if (about or message) not in self._warned:
            self._warned.add(about or message)
            warnings.warn(f"{type(self).__name__}: {message}", stacklevel=2)

    def log_values(self, pl_module: Any, values: dict[str, float], n: int) -> None:
        """Log what is equal on all processes already."""
        for key, value in values.items():
            pl_module.log(key, torch.tensor(value, dtype=torch.float32), sync_dist=True, batch_size=max(n, 1))

    def summed(self, trainer: Any, pl_module: Any, state: Tensor) -> Tensor:
        """A state of doubles, summed over all processes in one step."""
        if trainer.world_size == 1:
            return state
        reduced: Tensor = trainer.strategy.reduce(state.to(pl_module.device), reduce_op="sum")
        return reduced.cpu()

    # -- Lightning's hooks ---------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._unreadable = False
        if stage == "fit":
            self._entry = {}  # of another run; a resumed one reads its own from the checkpoint
        # Who reads alike listens together: the way to the logits is found once a run, not once a callback.
        first = next(c for c in trainer.callbacks if isinstance(c, Monitor) and c.probe is self.probe)
        self.listener = Listener(self.probe) if first is self else first.listener

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(trainer, pl_module, "test")

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._before(trainer, pl_module, batch, batch_idx, dataloader_idx, "val")

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._before(trainer, pl_module, batch, batch_idx, dataloader_idx, "test")

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._after(trainer, pl_module, batch_idx, dataloader_idx, "val")

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._after(trainer, pl_module, batch_idx, dataloader_idx, "test")

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._finish(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._finish(trainer, pl_module, "test")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.listener.close()
        super().on_exception(trainer, pl_module, exception)

    # Our own tables are ordinary tensors, also under Trainer.test, which runs in inference mode.
    @torch.inference_mode(False)
    def _begin(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._active(trainer, stage):
            self.recall(trainer)
            self.listener.reset()
            self.begin(trainer, pl_module, stage)

    @torch.inference_mode(False)
    def _before(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, loader: int, stage: str) -> None:
        if self._active(trainer, stage):
            step = self.listener.start(trainer, pl_module, stage, batch, batch_idx, loader)
            if not self.listener.announced:
                self.listener.announced = True
                self.say(trainer, f"{stage} is measured on what {step.name} gives its loss: {self.probe.found(step)}.")
            if loader == 0 and self._template is None and type(self).last is not Monitor.last:
                self._template = self._copy_to_read(batch, stage)
            self.before(trainer, step, batch_idx, loader, stage)

    def _copy_to_read(self, batch: Any, stage: str) -> Step | None:
        if self._unreadable:
            return None
        try:
            return self.listener.readable(stage).with_batch(rebuilt(batch, {}, copied))  # steps may write into theirs
        except (ProbeError, torch.cuda.OutOfMemoryError) as error:  # of gradients, in a batch sized for none
            self._unreadable = True
            warnings.warn(f"{self.label} measures nothing: {error}", stacklevel=2)
            return None

    @torch.inference_mode(False)
    def _after(self, trainer: Any, pl_module: Any, batch_idx: int, loader: int, stage: str) -> None:
        if not self._active(trainer, stage):
            return
        heard = self.listener.heard()
        if heard is not None:
            with torch.no_grad():
                self.hear(trainer, pl_module, heard, loader, stage)
        if loader == 0 and batch_idx + 1 == _batches(trainer) and self._template is not None:
            self.last(trainer, self._template, stage)
            self._template = None

    @torch.inference_mode(False)
    def _finish(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._active(trainer, stage):
            self.listener.close()
            if self._template is not None:  # nobody knew which batch was the last
                self.last(trainer, self._template, stage)
            with torch.no_grad():
                self.finish(trainer, pl_module, stage)
            self._template = None  # a batch is not held until the next epoch

    def _active(self, trainer: Any, stage: str) -> bool:
        return stage in self.stages and not trainer.sanity_checking


def _batches(trainer: Any) -> float:
    batches = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
    return float(batches[0]) if batches else float("inf")


def suffixes(trainer: Any) -> list[str]:
    """What is added to the keys of each loader: nothing for the first, the name or index for others."""
    return ["" if i == 0 else f"/{name}" for i, (name, _) in enumerate(evaluation_loaders(trainer))]
