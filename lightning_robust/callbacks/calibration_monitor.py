"""Whether confidence can be believed: ECE with its interval and floor, NLL and Brier score, in every evaluation."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from lightning_robust.attach.base import show_image, shows_images
from lightning_robust.attach.batches import Key
from lightning_robust.attach.everyone import Everyone
from lightning_robust.attach.groups import Groups
from lightning_robust.attach.listener import Heard, step_context
from lightning_robust.attach.monitor import Monitor, suffixes
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.step import Step
from lightning_robust.calibration import reliability_diagram
from lightning_robust.callbacks.measured_loader import MODES, UNKNOWN, MeasuredLoader
from lightning_robust.charts import risk_curve

__all__ = ["CalibrationMonitor"]

BESIDE = ("brier_", "group/", "ece_debiased")  # into the loggers alone


class CalibrationMonitor(Monitor):
    """Measure calibration from the logits of the user's own evaluation step, in state of fixed size.

    One forward a run finds out where the logits are; from then on they are heard, not computed again.

    Logs ``calibration/val/ece`` (expected calibration error of the likeliest class, equal-width bins), ``ece_low`` and
    ``ece_high`` (95 % interval), ``ece_floor`` (what a perfectly calibrated model of this size and confidence would
    show; an ECE near it says nothing against the model), ``nll``, ``brier`` and ``accuracy``; ``ece_rms``, ``ece_max``,
    ``ece_adaptive`` (bins of equal mass, ties never split), ``aurc`` (area under the risk-coverage curve: how well
    confidence ranks right before wrong) and ``accuracy_at_95``, ``_90`` and ``_80`` (of the surest 95, 90, 80 %), with
    ``test`` for ``val`` in ``Trainer.test``. Into the loggers alone go ``ece_debiased`` (squared; may be negative) and
    Murphy's ``brier_reliability``, ``brier_resolution`` and ``brier_uncertainty``.

    Of several loaders the first keeps these keys and the others add their name or index. Draws a reliability diagram
    and a risk-coverage curve in TensorBoard and leaves the bins in every checkpoint. Several labels or pixels a sample
    are predictions of their own.

    Args:
        bins: Of confidence, equally wide.
        stages: Where to measure: ``"val"`` (every validation, in ``fit`` too), ``"test"``, or both.
        mode: What a confidence is about: ``"top_label"``, the likeliest class; ``"positive"``, each yes of a yes/no
            output, whose bins are of P(yes) against how often it is yes; ``"per_label"``, the same with a table by
            label. ``aurc``, ``accuracy``, ``accuracy_at_...`` and the accuracy of groups are of the likelier answer in
            every mode, and ``ece_adaptive``, which is too, is left out in the other two.
        classwise: Count every class by itself, one against the rest: ``ece_classwise`` (mean over classes),
            ``worst_class_ece`` and which it is, ``worst_class``; and ``worst_class_accuracy``. On by itself in
            ``"per_label"``.
        group_key: Where in the batch a group for each sample is (integers or strings): ``worst_group_ece``,
            ``worst_group_ece_floor`` (of that very group), ``worst_group_accuracy`` and, into the loggers alone,
            ``group/{group}/ece``, ``ece_floor`` and ``accuracy``. Not where a step drops rows before its loss.
        diagram: Whether to draw the pictures.
        target_key: Where the target is, if no loss tells.
        logits_fn: ``(module, batch) -> logits`` where no loss can be read; needs ``target_key``.
        loss_index: Which loss call of the step is read, 0 for the first.
        strict: Raise whenever measuring fails; else a failure in the middle of a run is said once, its metrics are
            logged as NaN, and the run goes on.
        name: Tells two callbacks of this class apart: keys start with ``calibration.{name}``.

    Raises:
        ValueError: If bins is below 1, or a stage or the mode is unknown.

    Example:
        >>> CalibrationMonitor(bins=10).key("val", "ece")
        'calibration/val/ece'

    References:
        Guo et al., 2017, https://arxiv.org/abs/1706.04599. Geifman and El-Yaniv, 2017, https://arxiv.org/abs/1705.08500
        (risk and coverage).
    """

    def __init__(
        self,
        *,
        bins: int = 15,
        stages: Sequence[str] = ("val", "test"),
        mode: str = "top_label",
        classwise: bool = False,
        group_key: Key | None = None,
        diagram: bool = True,
        target_key: Key | None = None,
        logits_fn: Callable[..., Any] | None = None,
        loss_index: int = 0,
        strict: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__("calibration", name, Probe(None, target_key, logits_fn, loss_index), stages, strict=strict)
        if bins < 1:
            raise ValueError(f"bins= must be at least 1, got {bins}.")
        if mode not in MODES:
            near = difflib.get_close_matches(str(mode), MODES, 1, cutoff=0.3)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"mode= must be one of {', '.join(MODES)}, got {mode!r}.{hint}")
        self.bins, self.mode, self.diagram = bins, mode, diagram
        self.classwise = classwise or mode == "per_label"
        self.groups = None if group_key is None else Groups(group_key)
        self._loaders: dict[int, MeasuredLoader] = {}
        self._codes: Any = None  # the groups of the batch that is listened to

    def settings(self) -> Mapping[str, Any]:
        return {"bins": self.bins, "mode": self.mode, "stages": ", ".join(self.stages)}

    def headlines(self) -> Sequence[str]:
        return ["ece", "nll", "brier"]

    def rehearse(self, trainer: Any, step: Step, loader: int, stage: str) -> None:
        self.codes(self.groups, step.batch, len(self.listener.index), loader)
        if self.mode != "top_label" and loader == 0:  # which does not fit every head
            with step_context(trainer, stage), self.probe.reading(step, listening=True) as reading, torch.no_grad():
                call = reading.read(reading.x).detached()
            self._loader().add(Heard(call, reading.x, self.listener.index, self.listener.counts), None)

    def begin(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._loaders = {}

    def before(self, trainer: Any, step: Step, batch_idx: int, loader: int, stage: str) -> None:
        self._codes = self.codes(self.groups, step.batch, len(self.listener.index), loader)

    def hear(self, trainer: Any, pl_module: Any, heard: Heard, loader: int, stage: str) -> None:
        if loader not in self._loaders:
            self._loaders[loader] = self._loader()
        if self._codes is not None and not heard.by_sample:
            self.warn_once(UNKNOWN)
        self._loaders[loader].add(heard, self._codes)

    def _loader(self) -> MeasuredLoader:
        return MeasuredLoader(self.bins, self.mode, self.classwise, self.groups)

    def finish(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # Every process goes through all loaders: what is summed must be summed by all of them.
        for loader, suffix in enumerate(suffixes(trainer)):
            found = self._loaders.get(loader) or self._loader()
            found.everyones(Everyone(trainer, partial(self.summed, trainer, pl_module)))
            sums = found.sums
            if sums.invalid:
                warnings.warn(
                    f"{sums.invalid} predictions of the {stage} data{suffix} are NaN or infinite; they are left out of "
                    f"{self.key(stage, 'ece')}.",
                    stacklevel=2,
                )
            if not sums.n:
                continue
            measures = found.measures()
            beside = {name for name in measures if name.startswith(BESIDE)}
            keyed = {name: self.key(stage, name) + suffix for name in measures}
            self.log_values(pl_module, {keyed[m]: v for m, v in measures.items() if m not in beside}, sums.n)
            self.log_beside(trainer, {keyed[m]: v for m, v in measures.items() if m in beside})
            if self.diagram and shows_images(trainer):
                self._draw(trainer, found, stage, suffix)
            if loader == 0 and stage == "val":
                # `nll` beside the temperature is about the predictions that it is reported on.
                shown = {name: value for name, value in measures.items() if name != "nll" and "/" not in name}
                bins = {**sums.to_dict(), "nll": measures["nll"]}
                self.record(trainer, {**shown, "n": sums.n, "bins": bins, **found.tables()})
        self._loaders, self._codes = {}, None

    def _draw(self, trainer: Any, found: MeasuredLoader, stage: str, suffix: str) -> None:
        when = f", epoch {trainer.current_epoch + 1}" if trainer.state.fn == "fit" else ""
        title = f"{stage}{suffix}{when}"
        show_image(trainer, self.key(stage, "reliability") + suffix, reliability_diagram(found.sums, title))
        coverage, risk = found.grid.risk_coverage()
        picture = risk_curve(coverage, risk, f"{title}: AURC {found.grid.aurc:.4f}")
        show_image(trainer, self.key(stage, "risk_coverage") + suffix, picture)
