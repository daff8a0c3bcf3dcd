"""What a model looks at, photographed while it trains: filmstrips in TensorBoard and how far the maps drift."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_robust.attach.base import show_or_save, show_text
from lightning_robust.attach.batches import Key, as_path, one_input
from lightning_robust.attach.ending import is_last_evaluation
from lightning_robust.attach.foreign import foreign_input, foreign_loader
from lightning_robust.attach.listener import Heard, step_context
from lightning_robust.attach.monitor import Monitor
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.reading import Reading
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.callbacks.cadence import Cadence
from lightning_robust.callbacks.explainer import Explainer, submodule
from lightning_robust.callbacks.photographer import ENSEMBLE, Photographer
from lightning_robust.callbacks.probe_sets import ATTACKED, CHOICES, ProbeSets, joined
from lightning_robust.callbacks.saliency_charts import charts, show_charts
from lightning_robust.callbacks.time_budget import TimeBudget
from lightning_robust.callbacks.watched_probes import WatchedProbes
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import seeded
from lightning_robust.saliency.methods import as_method

__all__ = ["SaliencySnapshots"]

HEADLINES = (
    "(iou10|cosine)_to_.*|iou10_skill_.*|iou10_null|iou10_floor|gini|empty|mass_.*|alarm|flips|agreement"
    "|skipped|deletion.*|insertion.*|sensitivity|attack_.*"
)
"""Metrics that ``ModelCheckpoint`` and ``EarlyStopping`` may watch."""


class SaliencySnapshots(Monitor):
    """Explain the same few evaluation samples again and again, and show how the explanations change.

    A probe set is chosen once, in the first evaluation, from the first evaluation loader, and is then fixed for life;
    checkpoints know it by index and content. Every snapshot explains the *right* class of each probe, so that a changed
    prediction does not look like a changed explanation. The first snapshot is the anchor. Snapshots of an evaluation
    are taken after its last batch, with the weights that it measures, in eval mode; the training run does not change by
    a bit.

    Logs, for each probe set and method (``val_gradient``, ``val_hardest_gradcam``, ...):

    - ``saliency/val_gradient/iou10_to_anchor`` and ``_to_previous``: overlap of the tenth of the inputs that matters
      most; likewise ``cosine`` (centred), ``spearman`` (of inputs that are not 0 in both), ``ssim`` and
      ``centre_shift`` (pixels; pictures only).
    - ``iou10_null`` and ``iou10_floor``: the same between the anchor and maps by permuted weights, and of inputs with a
      little noise; ``iou10_skill_to_anchor`` and ``_to_previous``: 0 at the null, 1 at the floor. Likewise the others.
    - ``gini``, ``entropy``, ``mass_on_border``, ``mass_on_corners``, ``mass_in_region``: where and how narrowly maps
      look; ``empty``: the share of maps that are the same everywhere (class activation maps of sure samples often are,
      and two empty maps count as equal).
    - ``alarm``: 1 where maps that had settled have moved.
    - ``deletion``, ``insertion`` and so on with ``quality=True``; ``attack_...`` for the attacked set.

    and ``saliency/val/flips`` (share of probes predicted otherwise than at the anchor), ``agreement`` of the methods
    with ``ensemble=True``, ``skipped`` (snapshots so far that the budget did not allow). Pictures are
    ``saliency/val_gradient/filmstrip`` (inputs, maps from first to now, what changed) and ``/overlays``; without a
    logger that takes pictures they become PNG files in the folder ``saliency`` of the run. TensorBoard's Custom Scalars
    tab shows drift side by side.

    Args:
        methods: Names (``"gradient"``, ``"integrated_gradients"``, ``"gradcam"``, ...; see
            :data:`lightning_robust.saliency.METHODS`), functions ``(logits_fn, x, target) -> maps``, or attributions of
            captum.
        every_n_epochs: A snapshot in the first validation, then in each epoch that this divides, and in the last one as
            far as the Trainer knows it by then (``EarlyStopping`` decides later). Outside of ``fit`` always.
        every_n_validations: Count validations instead.
        every_n_steps: Count optimizer steps instead; begins after the first validation, which chooses the probes.
        samples: Size of a probe set.
        probes: How they are chosen: ``"stratified"`` by class and a seed, ``"hardest"`` (largest loss),
            ``"confident_wrong"`` (most sure of a wrong class); several are several sets.
        indices: The probes, by their numbers in the loader, instead.
        extra: Other probe sets by name: data sets or loaders of inputs like those of the evaluation. Their labels are
            not read; what is explained is the class predicted at the anchor.
        attack: An attack: adds the set ``attacked``, the first probe set as this attack changes it for the weights of
            each snapshot, explained for the right class.
        region_key: Where a batch holds a mask of each sample (an object, a watermark) for ``mass_in_region``.
        pixels: The pixel space of the inputs: for pictures, noise, and black as the baseline of path methods.
        layer: Name of the submodule whose output class activation maps weigh; by default it is found.
        classes: Names of the classes, for the pictures.
        ensemble: Add the mean of all methods' ranks as a method, and log how far they agree.
        quality: Measure deletion, insertion and sensitivity of each method; costs some fifty forwards a snapshot.
        sanity: Measure null and noise floor at the anchor; costs two more passes, once.
        cascade: At the end of a fit, and in ``validate`` and ``test``, permute the weights layer by layer, and write
            what becomes of the maps into ``saliency/val_gradient/cascade`` (a table among TensorBoard's texts).
        budget: Share of the training time that snapshots may take; one that would exceed it is skipped, which is said.
            The first ten seconds, the first and the last snapshot are free. None for no limit.
        alarm: Maps that had settled have moved where their skill to the previous snapshot falls below this share of its
            median so far. None for no alarm.
        stages: ``"val"`` (in ``fit`` and ``validate``), ``"test"``, or both; each has its own probe sets.
        seed: Of the choice of probes, of noise and permutations.
        input_key: Where in the batch the input is, if it cannot be told.
        target_key: Where the target is, if no loss tells.
        logits_fn: ``(module, batch) -> logits`` where no loss can be read; needs ``target_key``.
        loss_index: Which loss call of the step is read, 0 for the first.
        strict: Raise whenever measuring fails; else a failure in the middle of a run is said once, its metrics are
            logged as NaN, and the run goes on.
        name: Tells two callbacks of this class apart: keys start with ``saliency.{name}``.

    Attributes:
        measured: What the last evaluation logged, by key. ``trainer.callback_metrics`` holds the overlaps, skills,
            masses, alarms and the like; ranks, SSIM, shifts and entropy go to the loggers alone.
        sets: The probe sets.

    Raises:
        ValueError: If a method or a choice is unknown, a number is out of range, two cadences are given, or the module
            has no submodule ``layer``.

    Example:
        >>> SaliencySnapshots(["gradient"], every_n_epochs=5).key("val_gradient", "iou10_to_anchor")
        'saliency/val_gradient/iou10_to_anchor'

    References:
        Adebayo et al., 2018, https://arxiv.org/abs/1810.03292 (similarity of maps, randomised weights). Ghorbani et
        al., 2019, https://arxiv.org/abs/1710.10547 (overlap of the largest). The methods' pages name their own.
    """

    def __init__(
        self,
        methods: Sequence[str | Callable[..., Any]] = ("gradient", "integrated_gradients", "gradcam"),
        *,
        every_n_epochs: int = 1,
        every_n_validations: int | None = None,
        every_n_steps: int | None = None,
        samples: int = 8,
        probes: Sequence[str] = ("stratified",),
        indices: Sequence[int] | None = None,
        extra: dict[str, Dataset | DataLoader] | None = None,  # type: ignore[type-arg]  # jsonargparse builds `Dataset[Any]` itself
        attack: Callable[..., Any] | None = None,
        region_key: Key | None = None,
        pixels: PixelSpace | None = None,
        layer: str | None = None,
        classes: Sequence[str] | None = None,
        ensemble: bool = False,
        quality: bool = False,
        sanity: bool = True,
        cascade: bool = False,
        budget: float | None = 0.05,
        alarm: float | None = 0.25,
        stages: Sequence[str] = ("val",),
        seed: int = 0,
        input_key: Key | None = None,
        target_key: Key | None = None,
        logits_fn: Callable[..., Any] | None = None,
        loss_index: int = 0,
        strict: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(
            "saliency",
            name,
            Probe(one_input(input_key, type(self).__name__), target_key, logits_fn, loss_index),
            stages,
            strict=strict,
        )
        if isinstance(methods, str) or not methods:
            raise ValueError(f"methods= takes a list of methods, got {methods!r}.")
        if samples < 1:
            raise ValueError(f"samples= must be at least 1, got {samples}.")
        self.cadence = Cadence(every_n_epochs, every_n_validations, every_n_steps)
        if isinstance(probes, str) or not probes or not set(probes) <= set(CHOICES):
            raise ValueError(f"probes= takes a list of {', '.join(map(repr, CHOICES))}, got {probes!r}.")
        if alarm is not None and not 0 < alarm <= 1:
            raise ValueError(f"alarm= must be a share in (0, 1], or None, got {alarm}.")
        self.methods = dict(as_method(method) for method in methods)
        if len(self.methods) < len(methods) or ENSEMBLE in self.methods:
            raise ValueError(f"methods= must have different names, and none of them 'ensemble', got {methods}.")
        self.samples, self.seed, self.alarm, self.attack = samples, seed, alarm, attack
        self.layer, self.ensemble, self.cascade = layer, ensemble, cascade
        region_path = None if region_key is None else as_path(region_key)
        self._new_sets = partial(
            ProbeSets, self.stages, probes, indices, extra or {}, attack is not None, samples, seed, region_path
        )
        self._budget = TimeBudget(budget)
        self._explainer = Explainer(self.methods, layer, pixels, seed, self.warn_once, strict)
        self._photographer = Photographer(self._explainer, classes, ensemble, quality, sanity, seed, self.warn_once)
        self._forget()

    def _forget(self) -> None:
        self.sets = self._new_sets()
        self.measured: dict[str, float] = {}
        self._skipped = self._step = 0
        self._held: Step | None = None  # a batch to travel in, for snapshots between evaluations
        self._loaded_step = 0  # of the checkpoint; outside of fit the Trainer does not take it over
        self._warned = set()
        self._explainer.forget()

    def settings(self) -> Mapping[str, Any]:
        return {
            "methods": ", ".join(self.methods),
            "probes": ", ".join(self.sets.choices.values()),
            "samples": self.samples,
            "seed": self.seed,
            **self.cadence.settings(),
        }

    def section(self) -> Mapping[str, Any]:
        entry = self.sets.section()
        return {self.area: entry} if entry else {}

    def restore(self, entry: Mapping[str, Any]) -> None:
        self._loaded_step = int(entry.get("global_step", 0))
        self.sets.restore(entry.get(self.area, {}))

    # -- when ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._forget()  # of another run; a resumed one reads its films from the checkpoint
        else:  # perhaps of another module, on other data: what was chosen is chosen again, and compared
            self.sets.reconsider()
            self._loaded_step = 0
            self._explainer.forget()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._loaded_step = int(checkpoint.get("global_step", 0))

    def headlines(self) -> Sequence[str]:
        return ["flips"]

    def attach(self, trainer: Any, pl_module: Any) -> None:
        super().attach(trainer, pl_module)
        if self.layer is not None:
            submodule(pl_module, self.layer)  # fails now, not after the first epoch
        self._budget.start()
        ours = [callback for callback in trainer.callbacks if isinstance(callback, SaliencySnapshots)]
        if ours[0] is self:  # one layout holds everything: a second one would take the place of the first
            show_charts(trainer, {title: rows for callback in ours for title, rows in callback.charts().items()})

    def charts(self) -> Mapping[str, Any]:
        """The layout of TensorBoard's Custom Scalars tab."""
        sets = [joined("val", name) for name in self.sets.names] if "val" in self.stages else []
        return charts(self.area, sets, [*self.methods, *([ENSEMBLE] if self.ensemble else [])])

    def rehearse(self, trainer: Any, step: Step, loader: int, stage: str) -> None:
        if loader:
            return
        no_autocast = torch.autocast(trainer.strategy.root_device.type, enabled=False)
        # What cannot be read at all is said in the first evaluation, in which nothing is measured.
        with (
            suppress(ProbeError),
            step_context(trainer, stage),
            no_autocast,
            self.probe.reading(self.listener.readable(stage)) as reading,
        ):
            self._rehearse_on(reading, step)

    def _rehearse_on(self, reading: Reading, step: Step) -> None:
        """Two samples go through all that is set, which must not fail after an epoch only."""
        with torch.no_grad():
            labels = reading.read(reading.x).labels()
        if not labels.numel() == len(labels) == len(reading.x):
            return  # said when a batch is heard
        x, target = reading.x[:2].detach(), labels.flatten()[:2].clamp_min(0)
        self._explainer.check_pixels(x)
        self._explainer.space(x).to_model(x.float())
        maps = [self._explainer.maps(method, reading, x, target) for method in self.methods]
        self.sets.rehearse(step, next((m for m in maps if m is not None), None))
        if self.attack is not None:
            self.attack(lambda z: reading.logits(z), x, target, generator=[seeded(i) for i in range(len(x))])
        for name, source in self.sets.extra.items():
            batch = next(iter(foreign_loader(source, 2, 2, self.seed)), None)
            if batch is not None:
                foreign_input(batch, None, x, f"probe set {name!r}")

    def begin(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.measured, self._held = {}, None
        self.sets.begin(stage)

    def before(self, trainer: Any, step: Step, batch_idx: int, loader: int, stage: str) -> None:
        if loader == 0:
            self.sets.look_at(stage, step.batch)

    def hear(self, trainer: Any, pl_module: Any, heard: Heard, loader: int, stage: str) -> None:
        if loader or not self.sets.open(stage):
            return
        labels = heard.call.labels()
        if labels.numel() == len(labels) == len(heard.x):
            self.sets.hear(stage, heard)
            return
        self.warn_once(
            f"one class a sample can be explained; this module's loss gets labels {tuple(labels.shape)} for "
            f"{len(heard.x)} samples. Nothing is photographed."
        )
        self.sets.close(stage)

    def last(self, trainer: Any, template: Step, stage: str) -> None:
        summed = partial(self.summed, trainer, template.module)
        for said in self.sets.settle(trainer, stage, summed):
            self.warn_once(said)
        in_fit = trainer.state.fn == "fit"
        if self.cadence.steps is not None and in_fit:
            self._held = template
        self.sets.first(stage).evaluations += in_fit
        if self.sets.ready(stage) and self._due(trainer, stage):
            self._snapshot(trainer, template, stage)

    def finish(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._skipped and stage == "val":
            self.measured[self.key(stage, "skipped")] = float(self._skipped)
        self.log_values(pl_module, {k: v for k, v in self.measured.items() if _is_headline(k)}, self.samples)
        self.log_beside(trainer, {k: v for k, v in self.measured.items() if not _is_headline(k)})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        before, self._step = self._step, int(trainer.global_step)
        if self._held is None or not self.cadence.between(before, self._step) or self._taken(trainer, "val"):
            return
        if self._within_budget(trainer, pl_module):
            with self._surviving(trainer, "val"):
                self.measured = {}
                self._snapshot(trainer, self._held, "val")
                self._log_now(trainer, pl_module)

    def _taken(self, trainer: Any, stage: str) -> bool:
        """Whether there is a snapshot of this step already."""
        rows = self.sets.rows(stage)
        return bool(rows) and rows[-1]["step"] == trainer.global_step

    def _log_now(self, trainer: Any, pl_module: Any) -> None:
        """At this very step, whatever the interval of logging."""
        self.log_beside(trainer, self.measured)
        values = {k: torch.tensor(v, dtype=torch.float32) for k, v in self.measured.items() if _is_headline(k)}
        pl_module.log_dict(values, on_step=True, on_epoch=False, logger=False, batch_size=self.samples)

    def _due(self, trainer: Any, stage: str) -> bool:
        if trainer.state.fn != "fit" or not self.sets.started(stage):
            return True
        if self._taken(trainer, stage):  # between evaluations
            return False
        if is_last_evaluation(trainer):
            return True
        due = self.cadence.in_validation(trainer.current_epoch + 1, self.sets.first(stage).evaluations)
        return due and self._within_budget(trainer, trainer.lightning_module)

    def _within_budget(self, trainer: Any, pl_module: Any) -> bool:
        """One answer for all processes, that of the first."""
        over = torch.tensor([float(trainer.is_global_zero and not self._budget.allows())], dtype=torch.float64)
        if not bool(self.summed(trainer, pl_module, over).any()):
            return True
        self._skipped += 1
        self.warn_once(
            f"one more snapshot would take more than {self._budget.share:.0%} of the training time (so far "
            f"{self._budget.total:.0f} s): some are skipped. Take fewer (every_n_epochs=), with fewer methods or "
            "samples, or raise budget=.",
            "budget",
        )
        return False

    # -- what ----------------------------------------------------------------------------------------------------

    def _snapshot(self, trainer: Any, template: Step, stage: str) -> None:
        no_autocast = torch.autocast(trainer.strategy.root_device.type, enabled=False)
        first, last = not self.sets.started(stage), is_last_evaluation(trainer)
        with (
            step_context(trainer, stage),
            no_autocast,
            self.probe.reading(template) as reading,
            self._budget.spent(counts=not first and not last, typical=not first),
        ):
            place, summed = self.probe.route(template).input, partial(self.summed, trainer, template.module)
            for said in self.sets.choose_extra(trainer, stage, template, place, reading, summed):
                self.warn_once(said)
            caption, moment = self._moment(trainer)
            for watched in self.sets.of(stage).values():
                self._take(trainer, reading, stage, watched, caption, moment)

    def _take(
        self, trainer: Any, reading: Reading, stage: str, watched: WatchedProbes, caption: str, moment: dict[str, Any]
    ) -> None:
        probes, clean = watched.probes, None
        if probes is None:
            return
        x = probes.x.to(reading.x.device, reading.x.dtype)
        if watched.name == ATTACKED and self.attack is not None:
            clean, noise = x, [seeded(self.seed, i) for i in probes.index.tolist()]
            # As in a plain loop: the loss of the batch that probes travel in knows nothing of their labels.
            x = self.attack(lambda z: reading.logits(z), x, probes.label.to(x.device), generator=noise)
        taken = self._photographer.take(
            reading,
            watched,
            x,
            caption,
            clean=clean,
            draw=trainer.is_global_zero,
            cascade=self.cascade and is_last_evaluation(trainer),
        )
        watched.history.append({**moment, **taken.moved})
        if self.alarm is not None:
            taken.values |= {f"{method}/alarm": watched.alarm(method, self.alarm) for method in taken.moved}
        where = joined(stage, watched.name)
        self.measured |= {self.key(*_placed(where, name)): value for name, value in taken.values.items()}
        for name, picture in taken.pictures.items():
            show_or_save(trainer, self.key(*_placed(where, name)), picture)
        for name, text in taken.tables.items():
            show_text(trainer, self.key(*_placed(where, name)), text, file=True)

    def _moment(self, trainer: Any) -> tuple[str, dict[str, Any]]:
        """When it is, for a person and for the checkpoint."""
        step = int(trainer.global_step)
        if trainer.state.fn == "fit":
            epoch = trainer.current_epoch + 1
            often = self.cadence.steps is not None or trainer.val_check_batch < trainer.num_training_batches
            return f"step {step}" if often else f"epoch {epoch}", {"epoch": epoch, "step": step}
        step = step or self._loaded_step
        return f"step {step}" if step else trainer.state.fn.value, {"step": step}


def _is_headline(key: str) -> bool:
    """Whether it is for monitors of other callbacks too (``trainer.callback_metrics``), not for the loggers alone."""
    return re.fullmatch(HEADLINES, key.rpartition("/")[2]) is not None


def _placed(where: str, name: str) -> tuple[str, str]:
    """``val`` and ``gradient/gini`` to ``val_gradient`` and ``gini``; ``/flips`` stays with the set."""
    method, _, metric = name.partition("/")
    return joined(where, method), metric
