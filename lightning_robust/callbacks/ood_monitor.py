"""Whether the model notices that a picture is none of its own: separation of foreign data in every evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_robust.attach.base import show_image, shows_images
from lightning_robust.attach.batches import Key, one_input
from lightning_robust.attach.features import Caught
from lightning_robust.attach.groups import Groups
from lightning_robust.attach.listener import Heard, step_context
from lightning_robust.attach.monitor import Monitor
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.sharded import is_sharded, takes_part
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.callbacks.detecting import Detecting
from lightning_robust.callbacks.foreign_sets import ForeignSets, check_sets, find_input, known, plainly
from lightning_robust.callbacks.ood_summary import MEASURES, OODSummary
from lightning_robust.callbacks.own_inputs import read_attacked, read_synthetic
from lightning_robust.callbacks.scoring import Scoring
from lightning_robust.callbacks.tapped_step import TappedStep
from lightning_robust.losses import LossCall
from lightning_robust.ood import SYNTHETIC, detectors_named, scores_named
from lightning_robust.pixels import PixelSpace

__all__ = ["OODMonitor"]

IN_DISTRIBUTION = 50_000  # samples whose scores are kept: 0.4 MB a score
LARGEST_STATE = 16 * 2**20  # bytes of detectors in a checkpoint


class OODMonitor(Monitor):
    """Measure how well scores of the logits, and detectors on features, tell foreign inputs from the evaluation data.

    In-distribution scores come from the logits of the user's own evaluation step, features from what goes into its last
    linear layer; foreign inputs travel through the same step, without gradients, between its first and last batch. All
    scores are higher for more foreign inputs.

    Logs, for each set and score, ``ood/val/{set}/{score}_auroc``, ``_aupr_in`` and ``_aupr_out`` (which of the two is
    the positive class), ``_fpr95`` (share of own data taken for foreign where 95 % of the foreign are found) and
    ``_fpr95_id_positive`` (share of foreign data accepted where 95 % of the own are), with ``test`` for ``val`` in
    ``Trainer.test``. Of detectors, ``_auroc`` and ``_fpr95``. Into the loggers alone go the rest, 95 % intervals
    (``_auroc_low``, ``_auroc_high``, ``_fpr95_low``, ``_fpr95_high``) and ``_detection_error``.
    ``accepted/{score}_accuracy`` is the accuracy on the own samples below the threshold that accepts 95 % of the
    validation data, ``accepted/{score}_coverage`` how many those are; the thresholds stand in every checkpoint, and a
    test uses those that were found in validation (its own, where there are none). Whole tie groups, no sigmoid. The
    first loader holds the data that are not foreign. Log-probabilities (``nll_loss``) have no energy; several answers a
    sample (pixels, labels) are not measured.

    Args:
        sets: Names and data sets or loaders, of inputs as the evaluation data have them (labels are ignored). Batches
            made like those of the evaluation loader pass the same transfer hooks; others hold inputs as the model sees
            them. Token ids travel with the masks of their batch. By default three synthetic sets made of the evaluation
            pictures themselves: noise, shuffled pixels and mosaics of patches. They are easier to tell than most real
            foreign data.
        scores: Out of ``"energy"``, ``"max_logit"``, ``"msp"`` (in log space), ``"entropy"``, ``"gen"``, ``"margin"``.
        detectors: Out of ``"mahalanobis"`` (relative), ``"knn"``, ``"vim"``, or objects that follow
            :class:`~lightning_robust.ood.Detector`. They are fitted anew in every evaluation, on ``fit_data``, and
            stand in every checkpoint (up to 16 MiB), from where a ``Trainer.test`` in another process takes them.
            One that fails is said and left out, the others go on. Sharded models (FSDP) have none.
        feature_layer: Name of the submodule whose output the features are, ``(N, D)`` or ``(N, C, H, W)``; by default
            what goes into the last linear layer, which is found.
        fit_data: What detectors are fitted on, a data set or loader made like the evaluation loader's batches; by
            default samples out of those that the training sampler draws, as their data set gives them (one that draws
            from a random generator of its own is advanced by that, where its loader has no workers); a ``Trainer.test``
            after the fit takes the same ones.
        fit_samples: How many of them, a seeded choice.
        near: Names of sets that are near the own data; ``ood/val/near/...`` is the mean over them.
        far: Names of sets that are far from them, likewise.
        attacked: An attack: the evaluation data under it are one more set, ``attacked``.
        streaming: Count scores to 16 bits, half a MiB each, instead of keeping those of the first 50,000 evaluation
            samples: any number of them counts, mostly to 1e-5 of an AUROC.
        max_samples: Of each set: a seeded random choice of a data set, the first ones of a loader.
        group_key: Where in the batch a group for each sample is (integers or strings):
            ``{set}/{score}_worst_group_auroc`` and, into the loggers alone, ``group/{group}/{score}_rejected`` (share
            of its samples above the threshold). Not with ``streaming``.
        stages: Where to measure: ``"val"`` (every validation, in ``fit`` too), ``"test"``, or both.
        pixels: The pixel space of the inputs, for noise; by default [0, 1].
        seed: Of the choices, of the synthetic sets and of the attack.
        input_key: Where in the batch the input is, if it cannot be told.
        target_key: Where the target is, if no loss tells.
        logits_fn: ``(module, batch) -> logits`` where no loss can be read; needs ``target_key``.
        loss_index: Which loss call of the step is read, 0 for the first.
        strict: Raise whenever measuring fails; else a failure in the middle of a run is said once, its metrics are
            logged as NaN, and the run goes on.
        name: Tells two callbacks of this class apart: keys start with ``ood.{name}``.

    Raises:
        TypeError: If sets are given without names.
        ValueError: If there is no set, one that can be iterated only once or whose name means something else, no or an
            unknown score, or a number is out of range.

    Example:
        >>> OODMonitor(scores=["energy", "msp"]).sets.keys()
        dict_keys(['synthetic_noise', 'synthetic_shuffle', 'synthetic_mosaic'])

    References:
        Hendrycks and Gimpel, 2017, https://arxiv.org/abs/1610.02136 (msp). Liu et al., 2020,
        https://arxiv.org/abs/2010.03759 (energy). Hendrycks et al., 2022, https://arxiv.org/abs/1911.11132 (max_logit).
        Yang et al., 2022, https://arxiv.org/abs/2210.07242 (near and far; what is reported).
    """

    def __init__(
        self,
        sets: dict[str, Dataset | DataLoader] | None = None,  # type: ignore[type-arg]  # jsonargparse builds `Dataset[Any]` itself
        *,
        scores: Sequence[str] = ("energy", "max_logit", "msp", "entropy"),
        detectors: Sequence[Any] = (),
        feature_layer: str | None = None,
        fit_data: Dataset | DataLoader | None = None,  # type: ignore[type-arg]  # likewise
        fit_samples: int = 2000,
        near: Sequence[str] = (),
        far: Sequence[str] = (),
        attacked: Callable[..., Any] | None = None,
        streaming: bool = False,
        max_samples: int = 1000,
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
        super().__init__(
            "ood",
            name,
            Probe(one_input(input_key, type(self).__name__), target_key, logits_fn, loss_index),
            stages,
            strict=strict,
        )
        check_sets(sets)
        if isinstance(scores, str) or not scores:
            raise ValueError(f"scores= takes a list of scores, e.g. ['energy', 'msp'], got {scores!r}.")
        if max_samples < 1 or fit_samples < 2:
            raise ValueError(
                f"max_samples= must be at least 1 and fit_samples= at least 2, got {max_samples} and {fit_samples}."
            )
        if streaming and group_key is not None:
            raise ValueError("streaming= keeps no single sample, so that group_key= has nothing to tell apart.")
        self.sets: Mapping[str, Any] = SYNTHETIC if sets is None else sets
        self.synthetic = sets is None
        self.near, self.far = known("near", near, self.sets), known("far", far, self.sets)
        self.scores = scores_named(scores)
        self.detecting = None
        if detectors:
            named = detectors_named(detectors)
            self.detecting = Detecting(named, feature_layer, fit_data, fit_samples, seed, self.warn_once, strict)
        elif feature_layer is not None or fit_data is not None:
            raise ValueError("feature_layer= and fit_data= belong to detectors=, e.g. detectors=['knn'].")
        self.attacked, self.streaming = attacked, streaming
        self.groups = None if group_key is None else Groups(group_key)
        self.max_samples, self.pixels, self.seed = max_samples, pixels or PixelSpace(), seed
        self._foreign = ForeignSets(self.sets, max_samples, seed)
        self._tables: dict[str, Any] = {}
        self._own: Any = None
        self._scoring = Scoring(self.scores, self.detecting, streaming, self.warn_once)
        self._tapped = TappedStep(self.detecting)
        self._unattackable = self._testing = False
        self._weights_step: int | None = None  # of the checkpoint of this run
        self._codes: Tensor | None = None

    @property
    def names(self) -> list[str]:
        """All scores, those of detectors last."""
        return self._scoring.names

    def settings(self) -> Mapping[str, Any]:
        sets = ", ".join(self.sets)
        own = {"sets": sets, "scores": ", ".join(self.names), "max_samples": self.max_samples, "seed": self.seed}
        return own if self.attacked is None else {**own, "attacked": self.attacked}

    # -- when ----------------------------------------------------------------------------------------------------

    def headlines(self) -> Sequence[str]:
        return [f"{name}/{score}_{measure}" for name in self.sets for score in self.scores for measure in MEASURES]

    def restore(self, entry: Mapping[str, Any]) -> None:
        super().restore(entry)
        if self.detecting is not None:
            self.detecting.remember(self._entry.get("detectors", {}))
        measured, weights = self._entry.get("measured_step"), entry.get("global_step")
        self._weights_step = weights
        if self._testing and measured not in (None, weights):
            self.warn_once(
                f"the thresholds{'' if self.detecting is None else ' and detectors'} of this checkpoint were found at "
                f"step {measured}, its weights are from step {weights}: they belong to other weights. Validate before "
                "saving (ModelCheckpoint(save_on_train_epoch_end=False) does), or test a checkpoint that was."
            )

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._logged = {}  # what another run had is not missing in this one
        self._unattackable, self._testing, self._weights_step = False, stage == "test", None
        if self.detecting is not None:
            self.detecting.forget()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        detecting = self._detecting(pl_module)
        if detecting is not None and "val" in self.stages and trainer.enable_validation:
            detecting.check_training_data(trainer, pl_module)
        if detecting is not None:
            detecting.see(trainer)

    def rehearse(self, trainer: Any, step: Step, loader: int, stage: str) -> None:
        if loader:
            return
        self.codes(self.groups, step.batch, len(self.listener.index), loader)
        with self._readable(trainer, step, stage):
            detecting = self._detecting(step.module)
            if detecting is not None:
                detecting.rehearse(trainer, self.probe, step)
            if not self.synthetic:
                self._foreign.rehearse(trainer, self.probe, step)

    def begin(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._scoring.begin()
        self._tapped.close()
        if self.detecting is not None:
            self.detecting.begin()
        self._own = self._scoring.table(IN_DISTRIBUTION, own=True)
        names = [*self.sets, *(() if self.attacked is None else ("attacked",))]
        self._tables = {name: self._scoring.table(self.max_samples) for name in names}

    def before(self, trainer: Any, step: Step, batch_idx: int, loader: int, stage: str) -> None:
        self._tapped.close()
        if loader or self._unreadable:
            return
        self._codes = self.codes(self.groups, step.batch, len(self.listener.index), loader)
        if batch_idx == 0 or self.synthetic or self.attacked is not None:
            with self._readable(trainer, step, stage):
                self._read_foreign(trainer, step, batch_idx == 0, stage)
        if not self._unreadable:
            self._tapped.open(step)

    def _before(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, loader: int, stage: str) -> None:
        first = self._active(trainer, stage) and batch_idx == loader == 0
        detecting = self._detecting(pl_module) if first else None
        if detecting is None:
            super()._before(trainer, pl_module, batch, batch_idx, loader, stage)
            return
        # They are fitted together: a process that fails before that must not let the others wait.
        with detecting.meeting(self._several(trainer, pl_module)):
            super()._before(trainer, pl_module, batch, batch_idx, loader, stage)

    def _after(self, trainer: Any, pl_module: Any, batch_idx: int, loader: int, stage: str) -> None:
        try:
            super()._after(trainer, pl_module, batch_idx, loader, stage)
        finally:
            self._tapped.close()  # also where something else failed and nothing was heard

    def _several(self, trainer: Any, module: Any) -> Callable[[Tensor], Tensor] | None:
        return partial(self.summed, trainer, module) if trainer.world_size > 1 else None

    def _detecting(self, module: Any) -> Detecting | None:
        if self.detecting is None or not is_sharded(module):
            return self.detecting
        self.warn_once(
            f"{', '.join(self.detecting.detectors)}: the last layer of a sharded model (FSDP) lies in pieces on all "
            "processes, so detectors are left out and the scores of logits go on. Test the checkpoint on one device."
        )
        return None

    def _fit(self, detecting: Detecting, trainer: Any, step: Step) -> None:
        try:
            detecting.fit(trainer, self.probe, step, self._several(trainer, step.module))
        except ValueError as error:
            # On the first batch there is nothing to lose, unless this is about a fit that came before.
            if self.strict or (trainer.state.fn != "fit" and not detecting.remembers):
                raise
            self.warn_once(f"detectors are left out, the scores of logits go on: {error}", "detectors")

    def _read_foreign(self, trainer: Any, step: Step, first: bool, stage: str) -> None:
        detecting = self._detecting(step.module) if first else None
        if detecting is not None:
            self._fit(detecting, trainer, step)
        if self.synthetic:
            self._score_synthetic(trainer, step)
        elif first:
            for name in self.sets:
                for read in self._foreign.read(trainer, self.probe, step, name, self._forward):
                    self._add(self._tables[name], read.call, read.index, read.counts, read.caught)
        if self.attacked is not None and not self._unattackable:
            try:
                self._score_attacked(trainer, step, stage)
            except ProbeError as error:
                if self.strict:
                    raise
                self._unattackable = True
                self._tables["attacked"] = self._scoring.table(self.max_samples)
                self.warn_once(f"attacked= needs gradients, that set is left out, other sets go on: {error}")

    def _forward(self, module: Any, run: Callable[[], LossCall]) -> tuple[LossCall, Caught | None]:
        return plainly(module, run) if self.detecting is None else self.detecting.read(module, run)

    @contextmanager
    def _readable(self, trainer: Any, step: Step, stage: str) -> Iterator[None]:
        """Where foreign inputs cannot travel through this step at all, that is said and nothing is measured."""
        try:
            with step_context(trainer, stage), torch.no_grad():
                find_input(self.probe, step)
                yield
        except ProbeError as error:
            if self.strict:
                raise
            self._unreadable = True
            self.begin(trainer, step.module, stage)  # a part of a set is no set
            self.warn_once(f"foreign inputs cannot be read, nothing is measured: {error}")

    def hear(self, trainer: Any, pl_module: Any, heard: Heard, loader: int, stage: str) -> None:
        if loader == 0:
            caught = self._tapped.caught(trainer, self.probe, heard, stage)
            keep = heard.counts & self._mine(trainer, heard.index)
            self._add(self._own, heard.call, heard.index, keep, caught, own=True)

    def _mine(self, trainer: Any, index: Tensor) -> Tensor:
        """Which samples this process counts: counts cannot tell that all processes were given the same ones."""
        alone = not self.streaming or trainer.world_size == 1
        return torch.ones_like(index, dtype=torch.bool) if alone else index % trainer.world_size == trainer.global_rank

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._tapped.close()
        super().on_exception(trainer, pl_module, exception)

    def finish(self, trainer: Any, pl_module: Any, stage: str) -> None:
        own = self._own
        for table in (own, *self._tables.values()):
            table.load(self.summed(trainer, pl_module, table.state()))
        if self.groups is not None:
            self.groups.share(trainer)
        thresholds = None if stage == "val" else self._entry.get("thresholds")
        served = self._scoring.served(partial(self.summed, trainer, pl_module), self._unreadable)
        found = OODSummary(own, self._tables if served else {}, served, self.scores, self.warn_once)
        values, beside = found.values(thresholds, self.groups)
        for kind, names in (("near", self.near), ("far", self.far)):
            found.means(kind, names, values, beside)
        n = max((table.n for table in self._tables.values()), default=1)
        # What was there before and is missing now (a detector that failed, a set that cannot be read any more) is NaN.
        logged = dict.fromkeys(sorted(self._logged.get(stage, ())), math.nan)
        logged |= {self.key(stage, metric): value for metric, value in values.items()}
        self.log_values(pl_module, logged, n)
        self.log_beside(trainer, {self.key(stage, metric): value for metric, value in beside.items()})
        if shows_images(trainer):
            when = f", epoch {trainer.current_epoch + 1}" if trainer.state.fn == "fit" else ""
            for score, picture in found.pictures(f"{stage}{when}"):
                show_image(trainer, self.key(stage, f"{score}_histogram"), picture)
        if stage == "val":
            states = {} if self.detecting is None else self.detecting.state(LARGEST_STATE)
            self.record(trainer, {**found.entry(), **({"detectors": states} if states else {})} if values else {})
            if self._entry and trainer.state.fn != "fit" and self._weights_step is not None:
                self._entry["measured_step"] = self._weights_step  # where nothing is trained, Trainers count no steps
        self._tables, self._own, self._codes = {}, None, None

    # -- what ----------------------------------------------------------------------------------------------------

    def _score_synthetic(self, trainer: Any, step: Step) -> None:
        index = self.listener.index
        keep = self.listener.counts & (index < self.max_samples) & self._mine(trainer, index)
        if not takes_part(trainer, step.module, index, keep, self.max_samples):
            return
        read_synthetic(
            self.probe,
            step,
            self.sets,
            index,
            self._forward,
            lambda name, call, caught: self._add(self._tables[name], call, index, keep, caught),
            seed=self.seed,
            pixels=self.pixels,
            warn=self.warn_once,
        )

    def _score_attacked(self, trainer: Any, step: Step, stage: str) -> None:
        index = self.listener.index
        keep = self.listener.counts & (index < self.max_samples) & self._mine(trainer, index)
        if not takes_part(trainer, step.module, index, keep, self.max_samples):
            return
        no_autocast = torch.autocast(trainer.strategy.root_device.type, enabled=False)
        run = None if self.detecting is None or not self.detecting.fitted else self._forward
        with torch.enable_grad(), no_autocast:
            read_attacked(
                self.probe,
                self.listener.readable(stage),
                self.attacked,
                index,
                run,
                lambda call, caught: self._add(self._tables["attacked"], call, index, keep, caught),
                self.seed,
            )

    def _add(
        self, table: Any, call: LossCall, index: Tensor, keep: Tensor, caught: Caught | None, own: bool = False
    ) -> None:
        scores = self._scoring.of(call, len(index), caught)
        if scores is None:
            return
        if own:
            scores |= self._scoring.judged(scores, call, self._codes)
        keep = keep.cpu()
        table.add(index.cpu()[keep], {name: values[keep] for name, values in scores.items()})
