"""What callbacks that measure in evaluation share: which batches, when, and on which weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attach.base import RobustCallback, log, logged_step
from lightning_robust.attach.batches import copied, rebuilt
from lightning_robust.attach.groups import Groups
from lightning_robust.attach.listener import Heard, Listener
from lightning_robust.attach.loaders import evaluation_loaders
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import ProbeError

__all__ = ["Monitor", "suffixes"]

CROWD = 180  # metrics of ours in a run that was forked or spawned


class Monitor(RobustCallback):
    """Hears every evaluation batch and logs at the end of the epoch; the training run does not change by a bit.

    A subclass takes what it needs: :meth:`begin` before the first batch, :meth:`before` and :meth:`hear` around every
    step, :meth:`last` on the last batch (forwards of ours belong between the first and the last batch: in
    ``on_validation_epoch_end`` averaged weights have been swapped out again), :meth:`finish` to compute and log.

    No run is lost to a monitor. What is wrong from the start stops it while there is nothing to lose: in the sanity
    check, before the first training step, on the first batch of ``validate`` and ``test``. A monitor that fails later
    says so once, logs NaN for its metrics and tries again in the next evaluation.

    Args:
        area: First part of the log keys.
        name: Tells two callbacks of one class apart.
        probe: How steps are read.
        stages: ``"val"`` (in ``fit`` and ``validate``), ``"test"``, or both.
        strict: Raise whenever it fails, also in the middle of a run.

    Attributes:
        shown: The metric that the progress bar shows as well.
        left_out: Loaders behind the first one that cannot be measured in this evaluation.
    """

    shown = ""

    def __init__(
        self, area: str, name: str | None, probe: Probe, stages: Sequence[str], *, strict: bool = False
    ) -> None:
        super().__init__(area, name, probe)
        if isinstance(stages, str) or not stages or not set(stages) <= {"val", "test"}:
            raise ValueError(f"stages= takes a list of 'val', 'test' or both, got {stages!r}.")
        self.stages = tuple(stages)
        self.strict = strict
        self.listener = Listener(probe)
        self._heard_any = self._failed = False  # in this evaluation
        self._logged: dict[str, set[str]] = {}  # keys, by stage
        self.left_out: set[int] = set()
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

    def rehearse(self, trainer: Any, step: Step, loader: int, stage: str) -> None:
        """On the first batch of each loader in the sanity check: raise if this cannot be measured; keep nothing."""

    def headlines(self) -> Sequence[str]:
        """Metrics that every evaluation logs, so that they can be marked as missing from the first failure on."""
        return ()

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

    def log_values(self, pl_module: Any, values: Mapping[str, float], n: int) -> None:
        """Log what is equal on all processes already."""
        beside: dict[str, float] = {}
        for key, value in values.items():
            _area, stage, metric = key.split("/")[:3]
            known = self._logged.setdefault(stage.split("_")[0], set())
            if key not in known and _crowded(pl_module.trainer):
                beside[key] = value
                continue
            known.add(key)
            one = torch.tensor(value, dtype=torch.float32)
            pl_module.log(key, one, sync_dist=True, batch_size=max(n, 1), prog_bar=metric == self.shown)
        if beside:
            self.warn_once(
                f"the callbacks here log more than {CROWD} metrics, and a run that was launched by forking or spawning "
                f"hangs at its end when Lightning carries many of them home: {len(beside)} go into the loggers alone. "
                "Launch with torchrun or strategy='ddp', or measure less.",
                "crowd",
            )
            self.log_beside(pl_module.trainer, beside)

    def log_beside(self, trainer: Any, values: Mapping[str, float]) -> None:
        """Into the loggers, past Lightning: it reduces each metric by itself and carries all of them through a pipe."""
        if values and trainer.is_global_zero and not trainer.sanity_checking:
            for logger in trainer.loggers:
                logger.log_metrics(dict(values), step=logged_step(trainer))

    def codes(self, groups: Groups | None, batch: Any, n: int, loader: int) -> Tensor | None:
        """The group of each of ``n`` samples; of a loader behind the first only if it has any."""
        if groups is None:
            return None
        try:
            return groups.codes(batch, n)
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            if loader == 0:
                raise
            self.warn_once(f"loader {loader} is measured without groups: {error}", f"groups of loader {loader}")
            return None

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

    def attach(self, trainer: Any, pl_module: Any) -> None:
        if "val" in self.stages and not trainer.enable_validation:
            self.warn_once(
                "this fit has no validation, where it measures: give validation data and a validation_step (and "
                "limit_val_batches > 0), or stages=['test'] to measure in Trainer.test alone."
            )

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.sanity_checking and batch_idx == 0 and "val" in self.stages:
            self._rehearse(trainer, pl_module, batch, dataloader_idx)
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
    def _rehearse(self, trainer: Any, pl_module: Any, batch: Any, loader: int) -> None:
        self.recall(trainer)
        try:
            step = self._listen(trainer, pl_module, "val", batch, 0, loader)
            if step is not None:
                with self._first_of(loader, 0, "val"):
                    self.rehearse(trainer, step, loader, "val")
        except ProbeError:
            # Who reads training steps finds a way to the logits that validation does not show.
            if all(isinstance(c, Monitor) for c in trainer.callbacks if isinstance(c, RobustCallback)):
                raise
        finally:
            self.listener.close()

    @torch.inference_mode(False)
    def _begin(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._active(trainer, stage):
            self._heard_any = self._failed = False
            self.left_out = set()
            self.recall(trainer)
            self.listener.reset()
            with self._surviving(trainer, stage):
                self.begin(trainer, pl_module, stage)

    @torch.inference_mode(False)
    def _before(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, loader: int, stage: str) -> None:
        if self._active(trainer, stage) and not self._failed:
            with self._surviving(trainer, stage):
                step = self._listen(trainer, pl_module, stage, batch, batch_idx, loader)
                if step is None:
                    return
                if loader == 0 and self._template is None and type(self).last is not Monitor.last:
                    self._template = self._copy_to_read(batch, stage)
                with self._first_of(loader, batch_idx, stage):
                    self.before(trainer, step, batch_idx, loader, stage)

    def _listen(self, trainer: Any, pl_module: Any, stage: str, batch: Any, batch_idx: int, loader: int) -> Step | None:
        """The step to hear the batch in; None where a loader behind the first one cannot be read."""
        if loader in self.left_out:
            self.listener.close()
            return None
        try:
            step = self.listener.start(trainer, pl_module, stage, batch, batch_idx, loader)
        except ProbeError as error:
            if loader == 0 or self.strict:
                raise
            self._leave_out(loader, stage, error)
            return None
        if not self.listener.announced:
            self.listener.announced = True
            self.say(trainer, f"{stage} is measured on what {step.name} gives its loss: {self.probe.found(step)}.")
        return step

    @contextmanager
    def _first_of(self, loader: int, batch_idx: int, stage: str) -> Iterator[None]:
        """A loader behind the first one whose first batch cannot be measured is left out; the others go on."""
        try:
            yield
        except Exception as error:
            if loader == 0 or batch_idx > 0 or self.strict:
                raise
            self._leave_out(loader, stage, error)

    def _leave_out(self, loader: int, stage: str, error: Exception) -> None:
        self.left_out.add(loader)
        self.warn_once(f"loader {loader} of {stage} is left out, the others are measured: {error}", f"loader {loader}")
        self.listener.close()

    def _copy_to_read(self, batch: Any, stage: str) -> Step | None:
        if self._unreadable:
            return None
        try:
            return self.listener.readable(stage).with_batch(rebuilt(batch, {}, copied))  # steps may write into theirs
        except (ProbeError, torch.cuda.OutOfMemoryError) as error:  # of gradients, in a batch sized for none
            if self.strict:
                raise
            self._unreadable = True
            warnings.warn(f"{self.label} measures nothing: {error}", stacklevel=2)
            return None

    @torch.inference_mode(False)
    def _after(self, trainer: Any, pl_module: Any, batch_idx: int, loader: int, stage: str) -> None:
        if not self._active(trainer, stage):
            return
        if not self._failed:
            with self._surviving(trainer, stage):
                heard = self.listener.heard()
                if heard is not None:
                    with torch.no_grad():
                        self.hear(trainer, pl_module, heard, loader, stage)
                self._heard_any = True
        if loader == 0 and batch_idx + 1 == _batches(trainer):
            self._last(trainer, pl_module, stage)

    def _last(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """What is done together is done by all processes or by none: one that failed would let the others wait."""
        if type(self).last is Monitor.last or self._unreadable:
            return
        self._failed = self._failed_anywhere(trainer, pl_module)
        template, self._template = self._template, None  # a batch is not held until the next epoch
        if template is not None and not self._failed:
            with self._surviving(trainer, stage):
                self.last(trainer, template, stage)

    @torch.inference_mode(False)
    def _finish(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if not self._active(trainer, stage):
            return
        self.listener.close()
        if self._template is not None:  # nobody knew which batch was the last
            self._last(trainer, pl_module, stage)
        self._failed = self._failed_anywhere(trainer, pl_module)
        if not self._failed:
            with torch.no_grad(), self._surviving(trainer, stage):
                self.finish(trainer, pl_module, stage)
        if self._failed:
            self._template = None
            if stage == "val":
                self.record(trainer, {})
            missing = {self.key(stage, metric) for metric in self.headlines()} | self._logged.get(stage, set())
            self.log_values(pl_module, dict.fromkeys(sorted(missing), float("nan")), 1)

    @contextmanager
    def _surviving(self, trainer: Any, stage: str) -> Iterator[None]:
        """A failure in here is the monitor's, not the run's."""
        try:
            yield
        except Exception as error:
            nothing_lost = trainer.global_step == 0 if trainer.state.fn == "fit" else not self._heard_any
            if self.strict or nothing_lost:
                raise
            self._failed = True
            log.debug("%s failed in %s", self.label, stage, exc_info=error)
            goes_on = "training" if trainer.state.fn == "fit" else "evaluation"
            self.warn_once(
                f"failed in {stage} at step {trainer.global_step}: {type(error).__name__}: {error} Its metrics of this "
                f"evaluation are missing (NaN), and {goes_on} goes on; strict=True raises instead.",
                "failure",
            )

    def _failed_anywhere(self, trainer: Any, pl_module: Any) -> bool:
        return bool(self.summed(trainer, pl_module, torch.tensor([float(self._failed)], dtype=torch.float64)).any())

    def _active(self, trainer: Any, stage: str) -> bool:
        return stage in self.stages and not trainer.sanity_checking


def _crowded(trainer: Any) -> bool:
    """Whether a forked or spawned run has as many metrics of ours as can be carried home through a pipe."""
    # Lightning pickles all of them into a pipe of 64 KB that is read only after the process has ended. Some 300 bytes
    # each, and the user has some, too: 223 did not come through.
    if type(trainer.strategy.launcher).__name__ != "_MultiProcessingLauncher":
        return False
    return sum(len(keys) for c in trainer.callbacks if isinstance(c, Monitor) for keys in c._logged.values()) >= CROWD


def _batches(trainer: Any) -> float:
    batches = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
    return float(batches[0]) if batches else float("inf")


def suffixes(trainer: Any) -> list[str]:
    """What is added to the keys of each loader: nothing for the first, the name or index for others."""
    return ["" if i == 0 else f"/{name}" for i, (name, _) in enumerate(evaluation_loaders(trainer))]
