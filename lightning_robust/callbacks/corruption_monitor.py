"""What is left of a model when its data change: noise, blur, weather, codecs, and any loader of other data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_robust.attach.base import show_image, show_or_save
from lightning_robust.attach.batches import Key, one_input
from lightning_robust.attach.ending import is_last_evaluation
from lightning_robust.attach.everyone import Everyone
from lightning_robust.attach.groups import Groups
from lightning_robust.attach.listener import Heard, step_context
from lightning_robust.attach.loaders import evaluation_loaders, shuffles
from lightning_robust.attach.monitor import Monitor
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.reading import Reading
from lightning_robust.attach.sharded import takes_part
from lightning_robust.attach.step import Step
from lightning_robust.calibration import fit_temperature
from lightning_robust.callbacks.brought_temperature import Brought, brought
from lightning_robust.callbacks.measured_cells import MeasuredCells, check_first, metrics_of, other_data, update
from lightning_robust.callbacks.shift_cells import (
    CLEAN,
    SMALLEST,
    Cell,
    cells_of,
    check_loaders,
    check_metrics,
    corrupted,
    first_cells,
    is_picture,
)
from lightning_robust.callbacks.shift_summary import ShiftSummary
from lightning_robust.callbacks.shifted import finite_rows
from lightning_robust.corruptions import SEVERITIES, TABLES, applicable
from lightning_robust.losses import LossCall
from lightning_robust.metrics import Reservoir
from lightning_robust.ood import scores_named
from lightning_robust.pixels import PixelSpace

__all__ = ["CorruptionMonitor"]

ONCE = ("mean_", "retention", "worst_")  # metrics of all cells together
TRIED = 64  # samples of each loader of other data, in the sanity check
FITTED = 50_000  # clean predictions that the temperature is fitted on, as many as TemperatureScaling takes


class CorruptionMonitor(Monitor):
    """Measure accuracy, calibration and detectability under corruptions of the evaluation pictures; ImageNet-C-like.

    The first ``max_samples`` pictures of the first evaluation loader are corrupted on the model's device, between its
    first and last batch, and travel through the user's own evaluation step. A corrupted picture is a function of
    (seed, corruption, severity, sample) alone: the same in every epoch, batch and process. The settings are those of
    ImageNet-C or CIFAR-10-C, by size; the code is not, so that the numbers compare models here and are not to be set
    beside published ones. There is no mCE, which needs another network's errors.

    Logs ``shift/val/clean_accuracy`` and ``sampled_accuracy`` (mean over the cells that every evaluation of a fit
    measures); where all cells are measured, in the last validation of a fit, in ``validate`` and in ``test``, also
    ``mean_accuracy``, ``retention`` (of the clean accuracy), ``worst_accuracy``, ``mean_nll``, ``mean_ece``,
    ``mean_ece_floor`` (of perfectly calibrated models with the same confidences), ``mean_ece_scaled`` (at the
    temperature that fits all validation data *without* corruption; ``test`` takes that of the checkpoint),
    ``mean_{score}_auroc`` (shifted against clean, where a sample is one prediction), and a heat map, as a file where no
    logger takes pictures. Into the loggers alone, and into checkpoints, go ``mean_confidence``, ``mean_nll_scaled``,
    the values of single cells, ``shift/val/{corruption}_{severity}/accuracy`` and the other metrics, and those of the
    same samples without corruption, ``shift/val/clean/...``.

    Args:
        corruptions: Out of :data:`~lightning_robust.corruptions.CORRUPTIONS`; None for all that the pictures take.
            ``[]`` for ``shift_loaders`` alone.
        severities: 1 to 5.
        shift_loaders: Names and labelled data sets or loaders of other data, made like the evaluation loader's batches:
            ``shift/val/{name}/accuracy``. They are measured in every evaluation.
        max_samples: Of the evaluation loader, and of each of ``shift_loaders``. Where a step drops rows before its
            loss, whole batches are measured as long as all of their samples are among these, and no groups.
        per_epoch: Cells that are measured in each validation of a fit but the last, always the same ones, severity 3
            first; None for all, 0 for none.
        table: ``"imagenet"`` or ``"small"``; by default by size, ``small`` up to 64 pixels a side.
        scores: Out-of-distribution scores of which the AUROC of shifted against clean samples is measured; ``[]`` for
            none.
        metrics: torchmetrics objects by name, taking ``(probabilities, labels)``: ``{corruption}_{severity}/{name}``
            and ``mean_{name}``.
        group_key: Where in the batch a group for each sample is: ``sampled_worst_group_accuracy`` over the cells of
            ``sampled_accuracy``, ``worst_group_accuracy`` over all cells and, into the loggers alone,
            ``group/{group}/accuracy`` over the measured ones.
        stages: Where to measure: ``"val"`` (every validation, in ``fit`` too), ``"test"``, or both.
        pixels: The pixel space of the inputs; by default [0, 1] without normalisation. Not asked of bytes that
            a step tells from numbers.
        seed: Of what corruptions draw.
        input_key: Where in the batch the input is, if it cannot be told.
        target_key: Where the target is, if no loss tells.
        logits_fn: ``(module, batch) -> logits`` where no loss can be read; needs ``target_key``.
        loss_index: Which loss call of the step is read, 0 for the first.
        strict: Raise whenever measuring fails; else a failure in the middle of a run is said once, its metrics are
            logged as NaN, and the run goes on.
        name: Tells two callbacks of this class apart: keys start with ``shift.{name}``.

    Raises:
        TypeError: If ``shift_loaders`` or ``metrics`` have no names, or one of the loaders is none.
        ValueError: If there is nothing to measure, a name is unknown or means something else, or a number is out of
            range; before a fit, if a callback of the Trainer monitors what is logged in its last validation alone.

    Example:
        >>> monitor = CorruptionMonitor(corruptions=["fog", "contrast"], severities=[1, 5])
        >>> [cell.key for cell in monitor.cells]
        ['fog_1', 'fog_5', 'contrast_1', 'contrast_5']

    References:
        Hendrycks and Dietterich, 2019, https://arxiv.org/abs/1903.12261. Ovadia et al., 2019,
        https://arxiv.org/abs/1906.02530 (calibration under shift).
    """

    shown = "sampled_accuracy"

    def __init__(
        self,
        *,
        corruptions: Sequence[str] | None = None,
        severities: Sequence[int] = SEVERITIES,
        shift_loaders: dict[str, Dataset | DataLoader] | None = None,  # type: ignore[type-arg]  # jsonargparse builds `Dataset[Any]` itself
        max_samples: int = 500,
        per_epoch: int | None = 5,
        table: str | None = None,
        scores: Sequence[str] = ("msp",),
        metrics: Mapping[str, Any] | None = None,
        group_key: Key | None = None,
        stages: Sequence[str] = ("val", "test"),
        pixels: PixelSpace | None = None,
        seed: int = 0,
        input_key: Key | None = None,
        target_key: Key | None = None,
        logits_fn: Callable[..., Any] | None = None,
        loss_index: int = 0,
        strict: bool = False,
        name: str | None = None,
    ) -> None:
        probe = Probe(one_input(input_key, type(self).__name__), target_key, logits_fn, loss_index)
        super().__init__("shift", name, probe, stages, strict=strict)
        self.cells = cells_of(corruptions, severities)
        if isinstance(scores, str):
            raise ValueError(f"scores= takes a list, got {scores!r}; write scores=[{scores!r}].")
        if not self.cells and not shift_loaders:
            raise ValueError("CorruptionMonitor needs corruptions= or shift_loaders=, got neither.")
        if table is not None and table not in TABLES:
            raise ValueError(f"table= must be one of {', '.join(TABLES)}, or None for by size; got {table!r}.")
        if max_samples < 1 or (per_epoch is not None and per_epoch < 0):
            raise ValueError(
                f"max_samples= must be at least 1 and per_epoch= not negative, got {max_samples} and {per_epoch}."
            )
        check_loaders(shift_loaders)
        check_metrics({} if metrics is None else metrics)
        self._all = corruptions is None
        self.shift_loaders: Mapping[str, Any] = shift_loaders or {}
        self.max_samples, self.per_epoch, self.table = max_samples, per_epoch, table
        self.scores = tuple(scores_named(scores)) if scores else ()
        self.metrics = dict(metrics or {})
        self.groups = None if group_key is None else Groups(group_key)
        self.pixels, self.seed = pixels or PixelSpace(), seed
        self._everything = True  # whether all cells are measured in this evaluation
        self._counted: MeasuredCells | None = None  # in this evaluation
        self._fitted_on: Reservoir | None = None  # all clean predictions
        self._brought: Brought | None = None  # by a checkpoint

    def settings(self) -> Mapping[str, Any]:
        names = ", ".join(dict.fromkeys(cell.name for cell in self.cells))
        own = {"corruptions": names, "max_samples": self.max_samples, "per_epoch": self.per_epoch, "seed": self.seed}
        return {**own, "pixels": self.pixels, "loaders": ", ".join(self.shift_loaders)}

    # -- when ----------------------------------------------------------------------------------------------------

    def attach(self, trainer: Any, pl_module: Any) -> None:
        super().attach(trainer, pl_module)
        epochs = trainer.max_epochs
        once = epochs is not None and 0 <= epochs <= (trainer.check_val_every_n_epoch or 1)
        if self.per_epoch is None or once:
            return
        watching = [*trainer.callbacks, *trainer.lr_scheduler_configs]
        for watched in (getattr(one, "monitor", None) for one in watching):
            prefix, _, metric = str(watched).rpartition("/")
            if prefix == self.key("val", "x").removesuffix("/x") and metric.startswith(ONCE):
                raise ValueError(
                    f"monitor={watched!r} waits for a metric that is logged in the last validation alone, where all "
                    f"cells are measured; monitor {self.key('val', 'sampled_accuracy')!r}, or measure all of them in "
                    "every validation with CorruptionMonitor(per_epoch=None)."
                )

    def headlines(self) -> Sequence[str]:
        sampled = ["sampled_accuracy"] if self.cells and self.per_epoch != 0 else []
        return ["clean_accuracy", *sampled, *(f"{name}/accuracy" for name in self.shift_loaders)]

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._entry, self._brought = {}, None  # other weights come
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def recall(self, trainer: Any) -> None:
        if trainer.ckpt_path and not self._recalled:
            self._entry, self._brought = {}, None
        super().recall(trainer)

    def record(self, trainer: Any, measured: Mapping[str, Any]) -> None:
        super().record(trainer, measured)
        self._brought = None  # the weights in memory have a temperature of their own now

    def restore(self, entry: Mapping[str, Any]) -> None:
        super().restore(entry)
        self._brought = brought(entry, self.area)

    def rehearse(self, trainer: Any, step: Step, loader: int, stage: str) -> None:
        if loader:
            return
        self.codes(self.groups, step.batch, len(self.listener.index), loader)
        with step_context(trainer, stage), torch.no_grad():
            with self.probe.reading(step, listening=True) as reading:
                if self.cells and self._corruptible(reading):
                    x = reading.x  # all of it for one of them: whether these are pixels of this space
                    for cell in {cell.name: cell for cell in self._chosen(x, everything=True)}.values():
                        self._corrupted(cell, x, torch.arange(len(x)))
                        x = x[:1]
                call, tried = reading.read(reading.x), metrics_of([CLEAN], self.metrics)
                check_first(call, self.listener.index, self.max_samples)
                update(tried, CLEAN, call, self.listener.counts)
                for metric in tried.values() if trainer.world_size == 1 else ():
                    metric.check()
            for name in self.shift_loaders:
                empty = True
                for _ in self._other_data(trainer, step, name, min(self.max_samples, TRIED)):
                    empty = False
                if empty and trainer.world_size == 1:
                    raise ValueError(
                        f"shift_loaders[{name!r}] gave no batch at all; give a data set or loader that is not empty."
                    )

    def begin(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._counted = None
        self._fitted_on = Reservoir(FITTED, self.seed) if stage == "val" else None
        self._everything = self.per_epoch is None or trainer.state.fn != "fit" or is_last_evaluation(trainer)

    def before(self, trainer: Any, step: Step, batch_idx: int, loader: int, stage: str) -> None:
        if loader:
            return
        with step_context(trainer, stage), torch.no_grad():
            if batch_idx == 0:
                self._warn_of_shuffling(trainer)
                with self.probe.reading(step, listening=True) as reading:
                    corruptible = bool(self.cells) and self._corruptible(reading)
                    counted = self._prepare(self._chosen(reading.x, self._everything) if corruptible else [])
                for name in self.shift_loaders:
                    for call, index, counts in self._other_data(trainer, step, name, self.max_samples):
                        counted.add(Cell(name), call, index, counts)
            index = self.listener.index
            keep = self.listener.counts & (index < self.max_samples)
            if self._counted is None or not self._counted.corrupted:
                return
            if not takes_part(trainer, step.module, index, keep, self.max_samples):
                return
            codes = self.codes(self.groups, step.batch, len(index), loader)
            with self.probe.reading(step, listening=True) as reading:
                self._read_corrupted(self._counted, reading, index, keep, codes)

    def _prepare(self, measured: Sequence[Cell]) -> MeasuredCells:
        ordered = [cell for cell in self.cells if cell in measured]
        self._counted = MeasuredCells(
            ordered,
            self._sampled(ordered),
            list(self.shift_loaders),
            self.scores,
            self.metrics,
            self.groups,
            self.max_samples,
            self.seed,
            self.warn_once,
        )
        return self._counted

    def hear(self, trainer: Any, pl_module: Any, heard: Heard, loader: int, stage: str) -> None:
        if loader or self._counted is None:
            return
        if self._fitted_on is not None:
            self._fitted_on.add(*heard.rows)
        first = heard.counts & (heard.index < self.max_samples)
        if bool(first.any()):
            self._counted.add(CLEAN, heard.call, heard.index, first)

    def finish(self, trainer: Any, pl_module: Any, stage: str) -> None:
        everyone = Everyone(trainer, partial(self.summed, trainer, pl_module))
        counted = self._agreed(everyone)
        if counted is None:
            return
        temperature = self._temperature(everyone)
        found = counted.measures(everyone, temperature, pl_module.device)
        if CLEAN in found:
            counted.say_invalid(stage)
            groups = counted.groups(everyone)
            summary = ShiftSummary(found, counted.often, self.shift_loaders, self._everything, groups)
            self._log(trainer, pl_module, stage, summary, counted.n)
            if stage == "val":
                self.record(trainer, summary.entry(counted.n, temperature))
        self._counted, self._fitted_on = None, None

    # -- what ----------------------------------------------------------------------------------------------------

    def _corruptible(self, reading: Reading) -> bool:
        if is_picture(reading.x, SMALLEST):
            return True
        self.warn_once(
            f"corruptions are made for pictures (N, C, H, W) with sides of at least {SMALLEST}, the input is "
            f"{str(reading.x.dtype).removeprefix('torch.')} {tuple(reading.x.shape)}: name loaders of shifted data, "
            "shift_loaders={'other': loader}.",
            "pictures",
        )
        return False

    def _chosen(self, x: Tensor, everything: bool) -> list[Cell]:
        """The cells of this evaluation that the pictures take."""
        cells = [cell for cell in self.cells if not self._all or applicable(cell.name, x.shape[1])]
        return cells if everything else self._sampled(cells)

    def _sampled(self, cells: Sequence[Cell]) -> list[Cell]:
        return first_cells(cells, self.per_epoch, self.cells, self.seed)

    def _corrupted(self, cell: Cell, x: Tensor, index: Tensor) -> Tensor:
        return corrupted(cell, x, index, seed=self.seed, table=self.table, pixels=self.pixels)

    def _read_corrupted(
        self, counted: MeasuredCells, reading: Reading, index: Tensor, keep: Tensor, codes: Tensor | None
    ) -> None:
        rows = keep.nonzero().squeeze(1)
        if len(rows) < len(keep) and reading.divisible:
            reading = reading.at(rows.to(reading.x.device))
            index, keep = index[rows], keep[rows]
            codes = None if codes is None else codes[rows]
        for cell in counted.corrupted:
            counted.add(cell, reading.read(self._corrupted(cell, reading.x, index)), index, keep, codes)

    def _other_data(self, trainer: Any, step: Step, name: str, limit: int) -> Iterator[tuple[LossCall, Tensor, Tensor]]:
        return other_data(trainer, self.probe, step, name, self.shift_loaders[name], limit, self.seed)

    def _warn_of_shuffling(self, trainer: Any) -> None:
        if shuffles(evaluation_loaders(trainer)[0][1]):
            self.warn_once(
                "evaluation loader 0 shuffles, so that each epoch corrupts other samples and numbers of different "
                "epochs or checkpoints cannot be compared; use shuffle=False."
            )

    def _agreed(self, everyone: Everyone) -> MeasuredCells | None:
        """What was counted, if a process started at all; one without a batch takes over the cells of the others."""
        measured = [] if self._counted is None else self._counted.corrupted
        own = [self._counted is not None, *(cell in measured for cell in self.cells)]
        started, *anywhere = everyone.summed(torch.tensor(own, dtype=torch.float64)).bool().tolist()
        if started and self._counted is None:
            return self._prepare([cell for cell, some in zip(self.cells, anywhere, strict=True) if some])
        return self._counted

    def _temperature(self, everyone: Everyone) -> float | None:
        if self._fitted_on is None:  # a test: not of the data that are reported on
            if self._brought is None:
                return self._entry.get("temperature")
            if self._brought.stale:
                self.warn_once(self._brought.stale)
            return self._brought.temperature
        reduce, trainer = everyone.reduce, everyone.trainer
        log_p, labels = finite_rows(self._fitted_on.rows(reduce, trainer.global_rank, trainer.world_size))
        if not everyone.total(len(labels))[0]:
            return None
        return fit_temperature(log_p, labels, reduce=reduce).applied.temperature

    def _log(self, trainer: Any, pl_module: Any, stage: str, summary: ShiftSummary, n: int) -> None:
        self.log_values(pl_module, {self.key(stage, metric): value for metric, value in summary.values.items()}, n)
        self.log_beside(trainer, {self.key(stage, metric): value for metric, value in summary.beside.items()})
        if trainer.is_global_zero:
            when = f", epoch {trainer.current_epoch + 1}" if trainer.state.fn == "fit" else ""
            show = show_image if stage == "test" else show_or_save  # a test leaves no files behind
            for metric, picture in summary.pictures(f"{stage}{when}"):
                show(trainer, self.key(stage, f"{metric}_by_corruption"), picture)
