"""Honest probabilities: a temperature for each set of weights, stored in their checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_robust.attach.base import show_image, shows_images
from lightning_robust.attach.batches import Key
from lightning_robust.attach.everyone import Everyone
from lightning_robust.attach.groups import Groups
from lightning_robust.attach.labelled import read_labelled
from lightning_robust.attach.listener import Heard, step_context
from lightning_robust.attach.monitor import suffixes
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.step import Step
from lightning_robust.callbacks.after_fit import kept_files, read_loader, rewrite_files, validation_loader
from lightning_robust.callbacks.applied_temperature import AppliedTemperature
from lightning_robust.callbacks.fitted import Fitted, StoredFits, report
from lightning_robust.callbacks.kept_rows import KeptRows
from lightning_robust.callbacks.measured_loader import UNKNOWN, codes_of_rows
from lightning_robust.callbacks.recalibration import Recalibration, Rows, check_head, check_methods
from lightning_robust.callbacks.reported import UNSCALED, Reported

__all__ = ["TemperatureScaling"]


class TemperatureScaling(AppliedTemperature):
    """Fit the temperature that makes confidence honest, for the very weights that are validated.

    It is refitted from the validation logits at the end of every validation epoch (milliseconds, no extra forward) and
    written into every checkpoint saved after it, so that ``best.ckpt`` carries its own:
    :func:`~lightning_robust.load_temperature` reads it, :func:`~lightning_robust.calibrated` loads a module with it.

    Logs ``calibration/val/temperature`` and, cross-fitted (each half of the samples at the temperature of the other),
    ``nll_scaled`` and ``ece_scaled`` with ``ece_scaled_low``, ``ece_scaled_high`` (95 % interval) and
    ``ece_scaled_floor`` (a perfectly calibrated model of this size). ``Trainer.test`` logs the same keys with
    ``test`` for ``val``, at the temperature that was fitted in validation or came with the checkpoint. Only the first
    validation loader is fitted on. A reliability diagram shows both sides, as it is and scaled.

    Args:
        when: ``"validation"``, or ``"after_fit"``: once at the end of training, for the last weights and for every
            checkpoint kept on disk (those files are rewritten with their own temperature in them; a file that holds
            objects of your own classes is left as it is, with a warning).
            List it behind callbacks that exchange the weights when training ends (weight averaging).
        dataloader: Data of their own to fit on, a loader (or, in validation, a data set) made like that of validation;
            by default the first loader of validation itself. In validation it is read between the first and the last
            batch, and what is reported is about the validation data, none of which were fitted on.
        split: Fit on this share of the validation samples, a seeded choice, and report on the others; by default all
            are fitted on and reported cross-fitted.
        methods: Other recalibrators, fitted on the same predictions and kept in the same entry: ``"vector"`` (a scale
            and a bias for each class), ``"platt"`` (yes/no outputs), ``"isotonic"`` (needs scikit-learn). Logs
            ``nll_{method}``, ``ece_{method}`` and ``accuracy_{method}``, which they may change.
        prediction_sets: Share of samples whose set of classes may miss the right one, e.g. 0.1: split conformal sets
            ("lac" and "aps") of the scaled probabilities are fitted as well. Logs ``coverage_lac``, ``set_size_lac``,
            ``empty_lac`` (share of sets without any class), ``worst_class_coverage_lac`` and the same for aps, of
            samples that they were not fitted on.
        classwise: Log ``worst_class_ece_unscaled`` and ``worst_class_ece_scaled``, the calibration error of the worst
            class, one against the rest.
        group_key: Where in the batch a group for each sample is: ``worst_group_ece_unscaled`` and
            ``worst_group_ece_scaled``, and ``worst_group_ece_floor_unscaled`` and ``_scaled`` of those very groups. Not
            where a step drops rows before its loss.
        diagram: Whether to draw the diagram.
        checkpoints: Which files ``"after_fit"`` rewrites; by default all that the Trainer's checkpoint callbacks keep.
        apply: Divide the module's logits in ``Trainer.test`` and ``predict``. Other callbacks of this package still see
            the logits as they are.
        max_samples: Predictions kept for the fit, a seeded random sample of all; with more than 50 million /
            ``max_samples`` classes fewer of them (50 million / classes), so that 200 MB are enough.
        bins: Of the ECE.
        seed: Of that sample and of the halves.
        target_key: Where the target is, if no loss tells.
        logits_fn: ``(module, batch) -> logits`` where no loss can be read; needs ``target_key``.
        loss_index: Which loss call of the step is read, 0 for the first.
        strict: Raise whenever measuring fails; else a failure in the middle of a run is said once, its metrics are
            logged as NaN, and the run goes on.
        name: Tells two callbacks of this class apart: keys start with ``calibration.{name}``.

    Raises:
        ValueError: If a setting is out of range or belongs to another ``when``.
        ModuleNotFoundError: If ``"isotonic"`` is asked for without scikit-learn.

    Example:
        >>> TemperatureScaling().key("val", "temperature")
        'calibration/val/temperature'

    References:
        Guo et al., 2017, https://arxiv.org/abs/1706.04599, section 4.2.
    """

    def __init__(
        self,
        *,
        when: str = "validation",
        dataloader: Any = None,
        split: float | None = None,
        methods: Sequence[str] = (),
        prediction_sets: float | None = None,
        classwise: bool = False,
        group_key: Key | None = None,
        diagram: bool = True,
        checkpoints: Sequence[str] | None = None,
        apply: bool = False,
        max_samples: int = 50_000,
        bins: int = 15,
        seed: int = 0,
        target_key: Key | None = None,
        logits_fn: Callable[..., Any] | None = None,
        loss_index: int = 0,
        strict: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name, Probe(None, target_key, logits_fn, loss_index), apply, strict=strict)
        if when not in ("validation", "after_fit"):
            raise ValueError(f"when= must be 'validation' or 'after_fit', got {when!r}.")
        if when == "validation" and checkpoints is not None:
            raise ValueError("checkpoints= belongs to when='after_fit'; in validation every checkpoint gets its own.")
        if when == "after_fit" and isinstance(dataloader, Dataset):
            raise ValueError("dataloader= takes a loader, got a data set: DataLoader(data_set, batch_size=...).")
        if split is not None and (not 0 < split < 1 or dataloader is not None or when != "validation"):
            raise ValueError(
                f"split= is a share of the validation data between 0 and 1, for when='validation' without dataloader=; "
                f"got {split}."
            )
        check_methods(methods, prediction_sets)
        if max_samples < 2 or bins < 1:
            raise ValueError(f"max_samples= must be at least 2 and bins= at least 1, got {max_samples} and {bins}.")
        self.when, self.dataloader, self.checkpoints = when, dataloader, checkpoints
        self.max_samples, self.bins, self.seed = max_samples, bins, seed
        self.split, self.methods, self.alpha = split, tuple(methods), prediction_sets
        self.classwise, self.diagram = classwise, diagram
        self.groups = None if group_key is None else Groups(group_key)
        self._bound_said = False
        self._saved: dict[str, None] = {}  # files that checkpoint callbacks wrote in this fit, in order
        self._kept = self._new()
        self._tested: dict[int, Reported] = {}
        self._stored = StoredFits({}, {})
        self._codes: Tensor | None = None

    def settings(self) -> Mapping[str, Any]:
        own = {"when": self.when, "apply": self.apply, "max_samples": self.max_samples, "seed": self.seed}
        more = {"split": self.split, "methods": ", ".join(self.methods), "prediction_sets": self.alpha}
        return {**own, **{name: value for name, value in more.items() if value}}

    # -- when ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._bound_said = False
        if stage == "fit":
            self._saved = {}

    def attach(self, trainer: Any, pl_module: Any) -> None:
        if trainer.enable_validation and self.when == "validation" and self.dataloader is None and self.split is None:
            monitored = [m for m in (getattr(c, "monitor", None) for c in trainer.checkpoint_callbacks) if m]
            if monitored:
                self.say(
                    trainer,
                    f"TemperatureScaling: the validation data choose the weights ({monitored[0]}), fit the temperature "
                    "and report on both. What is published wants data of its own: dataloader= or split=, or the test.",
                )
        if trainer.enable_validation or (self.dataloader is not None and self.when == "after_fit"):
            return
        if self.when == "after_fit":
            raise ValueError("TemperatureScaling(when='after_fit') needs dataloader= where there is no validation.")
        warnings.warn(
            "TemperatureScaling fits in validation, and this fit has none: give it validation data, or use "
            "when='after_fit' with dataloader=.",
            stacklevel=2,
        )

    def headlines(self) -> Sequence[str]:
        return ["temperature", "nll_scaled", "ece_scaled"] if self.when == "validation" else []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._saved.update(kept_files(trainer))  # before the next save hides the last one

    def begin(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._forget()
        if stage == "test" and self.temperature is None:
            warnings.warn(
                "TemperatureScaling has no temperature for these weights: fit with it, test with ckpt_path= of a "
                "checkpoint that stores one, or run Trainer.validate first.",
                stacklevel=2,
            )
        if stage == "test":
            self._check_weights()
            self._stored = StoredFits.load(self._entry, self.methods, self.alpha)

    def _forget(self) -> None:
        self._kept, self._tested = self._new(), {}

    def _new(self) -> KeptRows:
        return KeptRows(self.max_samples, self.seed, self.split, self._reads_its_own)

    def rehearse(self, trainer: Any, step: Step, loader: int, stage: str) -> None:
        if loader:
            return
        self.codes(self.groups, step.batch, len(self.listener.index), loader)
        with step_context(trainer, stage), torch.no_grad():
            if "platt" in self.methods:
                with self.probe.reading(step, listening=True) as reading:
                    check_head(self.methods, reading.read(reading.x).rows()[0])
            if self._reads_its_own:
                empty = True
                for reading, _, _ in read_labelled(trainer, self.probe, step, self.dataloader, 1, "dataloader"):
                    reading.read(reading.x).rows()
                    empty = False
                if empty:
                    raise ValueError("dataloader= gave no batch to fit the temperature on; give labelled data.")

    def before(self, trainer: Any, step: Step, batch_idx: int, loader: int, stage: str) -> None:
        fits = self._fits_in(trainer, stage)
        if fits and loader:
            return
        self._codes = self.codes(self.groups, step.batch, len(self.listener.index), loader)
        if not fits:
            return
        if self._codes is not None:
            self._kept.add_groups(self.listener.index, self._codes)
        if batch_idx == 0 and self._reads_its_own:
            with step_context(trainer, stage), torch.no_grad():
                self._kept.read_apart(trainer, self.probe, step, self.dataloader)

    @property
    def _reads_its_own(self) -> bool:
        """Whether validation fits on other data than those of validation."""
        return self.dataloader is not None and self.when == "validation"

    def _fits_in(self, trainer: Any, stage: str) -> bool:
        return stage == "val" and not (trainer.state.fn == "fit" and self.when == "after_fit")

    def hear(self, trainer: Any, pl_module: Any, heard: Heard, loader: int, stage: str) -> None:
        if stage == "test":
            if self.temperature is not None:
                rows = Rows(*heard.rows)
                reported = self._tested.setdefault(loader, self._report())
                if self._codes is not None:
                    rows = replace(rows, codes=codes_of_rows(heard, self._codes, rows.sample))
                    reported.unknown |= self._unknown(heard)
                self._stored.count(reported, rows)
        elif loader == 0 and self._fits_in(trainer, stage):
            check_head(self.methods, heard.rows[0])
            self._kept.unknown |= self._codes is not None and self._unknown(heard)
            self._kept.add(*heard.rows)

    def _unknown(self, heard: Heard) -> bool:
        """Whether groups cannot be reported, which is said."""
        if not heard.by_sample:
            self.warn_once(UNKNOWN)
        return not heard.by_sample

    def finish(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "test":
            self._report_test(trainer, pl_module)
        elif self._fits_in(trainer, stage):
            values = self._fit(trainer, pl_module, draw=self.diagram)
            if values:
                self.log_values(pl_module, values, self._entry["samples"])
        self._forget()

    @torch.inference_mode(False)
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._weights_step = int(trainer.global_step)
        if self.when == "after_fit":
            with self._surviving(trainer, "after_fit"):
                self._after_fit(trainer, pl_module)

    # -- fitting -------------------------------------------------------------------------------------------------

    def _everyone(self, trainer: Any, pl_module: Any) -> Everyone:
        return Everyone(trainer, partial(self.summed, trainer, pl_module))

    def _summed(self, trainer: Any, pl_module: Any, *counts: int) -> list[int]:
        return self._everyone(trainer, pl_module).total(*counts)

    def _report(self) -> Reported:
        return Reported(self.bins, self.classwise, self.groups)

    def _fit(self, trainer: Any, pl_module: Any, *, draw: bool) -> dict[str, float]:
        """Fit what was kept; what is to be logged of it, nothing where there was nothing to fit on."""
        everyone = self._everyone(trainer, pl_module)
        fitted_on, others = self._kept.parted(everyone)
        if not everyone.total(len(fitted_on))[0]:
            if not self._kept.lost:  # that was said
                self.warn_once(
                    f"no temperature is fitted: of {self._source} there is no prediction with a label (no batch, or "
                    "nothing but ignored labels). Give labelled data to fit on.",
                    "nothing fitted",
                )
            return {}
        recalibration = Recalibration(self.methods, self.alpha, self.seed, everyone)
        fit = recalibration.fit(fitted_on)
        fitted = Fitted(fit, recalibration, self._reported(recalibration, fitted_on, others))
        if not fitted.reported.n:
            self._say_nothing_left(trainer, fit.samples, asked=others is not None)
        self._routes = list(self.probe.routes.values())
        self._weights_step = int(trainer.global_step)
        self._entry = fitted.entry(self._weights_step)
        if fit.at_bound and not self._bound_said:
            self._bound_said = True
            kept = "1 is kept" if fit.temperature == 1 else f"{fit.temperature:g} is a bound, not a finding"
            self.say(
                trainer,
                f"TemperatureScaling: no best temperature exists for these {fit.samples} predictions (all right, or no "
                f"better than chance); {kept}.",
            )
        if fitted.reported.n and draw and shows_images(trainer):
            self._draw(trainer, fitted.reported, "val", fit.temperature, cross_fitted=others is None)
        return {self.key("val", name): value for name, value in fitted.values().items()}

    def _say_nothing_left(self, trainer: Any, samples: int, asked: bool) -> None:
        """Once: a warning where predictions to report on were asked for, a line where a set has no two halves."""
        nothing = (
            f"the temperature is fitted on {samples} predictions, and no others are left to report on; only "
            f"{self.key('val', 'temperature')} is logged. Give more validation data"
            f"{'' if self.split is None else ' or another split='}."
        )
        if asked:
            self.warn_once(nothing, "nothing reported")
        elif "nothing reported" not in self._warned:
            self._warned.add("nothing reported")
            self.say(trainer, f"TemperatureScaling: {nothing}")

    def _reported(self, recalibration: Recalibration, fitted_on: Rows, others: Rows | None) -> Reported:
        reported = self._report()
        reported.unknown = self._kept.unknown
        return report(recalibration, fitted_on, others, reported)

    @property
    def _source(self) -> str:
        if self.dataloader is not None:
            return "dataloader="
        return "the validation data" if self.split is None else f"split={self.split:g} of the validation data"

    def _report_test(self, trainer: Any, pl_module: Any) -> None:
        if self.temperature is None:
            return
        everyone = self._everyone(trainer, pl_module)
        for loader, suffix in enumerate(suffixes(trainer)):
            reported = self._tested.get(loader) or self._report()
            reported.everyones(everyone, list(self._stored.recalibrators), list(self._stored.sets))
            lost = reported.by_method[UNSCALED].invalid
            if lost:
                warnings.warn(
                    f"{lost} predictions of the test data{suffix} are NaN or infinite; they are left out of "
                    f"{self.key('test', 'nll_scaled')}.",
                    stacklevel=2,
                )
            if reported.n:
                values = {**reported.values(), "temperature": self.temperature}
                keyed = {self.key("test", name) + suffix: value for name, value in values.items()}
                self.log_values(pl_module, keyed, reported.n)
                if self.diagram and shows_images(trainer):
                    self._draw(trainer, reported, "test", self.temperature, suffix)

    def _draw(
        self,
        trainer: Any,
        reported: Reported,
        stage: str,
        temperature: float,
        suffix: str = "",
        *,
        cross_fitted: bool = False,
    ) -> None:
        when = f", epoch {trainer.current_epoch + 1}" if trainer.state.fn == "fit" else ""
        scaled = f"at T {temperature:.3g}{' (cross-fitted)' if cross_fitted else ''}"
        picture = reported.picture(f"{stage}{suffix}{when}", scaled)
        show_image(trainer, self.key(stage, "reliability_scaled") + suffix, picture)

    # -- after the fit -------------------------------------------------------------------------------------------

    def _after_fit(self, trainer: Any, pl_module: Any) -> None:
        loader = validation_loader(trainer) if self.dataloader is None else self.dataloader
        self._saved.update(kept_files(trainer))
        files = [str(path) for path in (self._saved if self.checkpoints is None else self.checkpoints)]
        summed = partial(self._summed, trainer, pl_module)

        def fit(step: int) -> Mapping[str, Any] | None:
            if not self._fit_on(trainer, pl_module, loader, draw=False):
                return None
            routes = {name: route.to_dict() for name, route in self.probe.routes.items()}
            return {"route": routes, self.area: {**self._entry, "fit_step": step}}

        rewritten = rewrite_files(trainer, pl_module, files, summed, fit, expected=self.checkpoints is not None)
        self._entry = {}  # that of the last file
        if self._fit_on(trainer, pl_module, loader, draw=self.diagram):
            written = f"; {rewritten} checkpoints got theirs, each for its own weights" if rewritten else ""
            self.say(trainer, f"TemperatureScaling: T = {self.temperature:.4g} for the last weights{written}.")

    def _fit_on(self, trainer: Any, pl_module: Any, loader: Any, *, draw: bool) -> bool:
        self._forget()
        read_loader(trainer, pl_module, self.probe, loader, self._kept.add)
        found = self._fit(trainer, pl_module, draw=draw)
        self._forget()
        return bool(found)
