"""Clean and robust accuracy on the same samples, in ``fit``, ``validate`` and ``test``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import RandomSampler

from lightning_robust.attach.attacked import AttackedBatch, at_radius
from lightning_robust.attach.base import show_image, show_text
from lightning_robust.attach.batches import InputKey, Key
from lightning_robust.attach.checkpoint import pack_bits
from lightning_robust.attach.groups import Groups
from lightning_robust.attach.listener import step_context
from lightning_robust.attach.loaders import evaluation_loaders
from lightning_robust.attach.monitor import Monitor, suffixes
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.reading import Reading
from lightning_robust.attach.sharded import is_sharded, takes_part
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.attacks import APGD, FGSM, NFGSM, PGD, AutoAttack, Square, ThreatModel, UniformNoise, WorstCase
from lightning_robust.attacks.masking import CHECKS, MaskingReport, diagnose
from lightning_robust.callbacks.robust_summary import curve_picture, summary
from lightning_robust.losses import LossCall
from lightning_robust.metrics import SampleScores, UnderAttack
from lightning_robust.pictures import attack_strips
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import seeded

__all__ = ["RobustAccuracy"]

OneAttack = PGD | APGD | Square | WorstCase | AutoAttack | FGSM | NFGSM | UniformNoise | Callable[..., Any]


class RobustAccuracy(Monitor):
    """How often the model is right, and how often it stays right under attack.

    Both numbers are about the same samples: the first ``max_samples`` of each loader, the same in every epoch. A sample
    counts as robust if it is right as it is *and* under every attack. Attacks run in fp32, on random numbers of
    their own that depend on the sample's index alone: neither the batch size nor the number of processes moves a
    result, and the training run does not change by a bit.

    Logs ``robust/val/clean_accuracy``, ``robust/val/accuracy`` (worst case over all attacks) and
    ``robust/val/accuracy_{attack}``, the 95 % interval of the worst case (``interval_low``, ``interval_high``) with the
    number of ``samples``, ``worst_class_accuracy`` where samples have classes, and what the arguments below add; with
    ``test`` for ``val`` in ``Trainer.test``. Of several loaders the first keeps these keys and the others add their
    name or index. Use ``ModelCheckpoint(monitor="robust/val/accuracy",
    mode="max", auto_insert_metric_name=False)`` to keep the most robust weights. For several labels or pixels a sample,
    "right" is the share of them that is right.

    Args:
        attacks: One attack, a list of them, or a dict that names them. Anything ``(logits_fn, x, y) -> x_adv``.
        max_samples: How many samples of each loader are attacked.
        stages: Where to measure: ``"val"`` (every validation, in ``fit`` too), ``"test"``, or both. A cheap attack
            for selection and a strong one for the report are two callbacks with one stage each.
        curve: Radii in pixel units for accuracy over the radius, of the first attack: ``robust/val/curve/{radius}``, a
            picture, and ``mean_radius``, the mean over all samples of the smallest perturbation found that fools it (0
            where it is wrong anyway, the largest radius where none was found).
        calibration: Also log mean confidence and calibration error under each attack: ``confidence_{attack}``,
            ``ece_{attack}``. Attacks then run to their end, since one that stops when a sample is fooled leaves it
            where the model is least sure.
        metrics: torchmetrics objects by name, taking ``(logits, labels)``: ``{name}_{attack}``, and ``{name}_clean``.
        group_key: Where in the batch a group for each sample is (integers or strings): accuracy by group, clean and
            robust, ``group/{group}/accuracy``, and ``worst_group_accuracy``.
        masking: Diagnose gradient masking on the first batch of each test (up to 256 samples):
            :func:`~lightning_robust.attacks.diagnose`. Costs about 20 times the first attack on those samples.
        examples: Rows of the example picture in TensorBoard; 0 for none.
        seed: Of the attacks' random starts.
        input_key: Where in the batch the input is, if it cannot be told; a list for several inputs.
        target_key: Where the target is, if no loss tells.
        mask_key: Where in the batch a mask is, 1 where attacks may change the input.
        eps_key: Where in the batch a radius for each sample is, in pixel units.
        logits_fn: ``(module, batch) -> logits`` where no loss can be read; needs ``target_key``.
        loss_index: Which loss call of the step is read, 0 for the first.
        strict: Raise whenever measuring fails; else a failure in the middle of a run is said once, its metrics are
            logged as NaN, and the run goes on.
        name: Tells two callbacks of this class apart: keys start with ``robust.{name}``.

    Raises:
        ValueError: If there is no attack, two have one name, or max_samples is below 1.

    Example:
        >>> from lightning_robust import PGD, ThreatModel
        >>> RobustAccuracy(PGD(ThreatModel("linf", eps=0.2), steps=20, restarts=2)).attacks.keys()
        dict_keys(['pgd20x2_linf_0.2'])
    """

    shown = "accuracy"

    def __init__(
        self,
        attacks: OneAttack | list[OneAttack] | dict[str, OneAttack],
        *,
        max_samples: int = 1000,
        stages: Sequence[str] = ("val", "test"),
        curve: Sequence[float] = (),
        calibration: bool = False,
        metrics: Mapping[str, Any] | None = None,
        group_key: Key | None = None,
        masking: bool = False,
        examples: int = 6,
        seed: int = 0,
        input_key: InputKey | None = None,
        target_key: Key | None = None,
        mask_key: Key | None = None,
        eps_key: Key | None = None,
        logits_fn: Callable[..., Any] | None = None,
        loss_index: int = 0,
        strict: bool = False,
        name: str | None = None,
    ) -> None:
        probe = Probe(input_key, target_key, logits_fn, loss_index, mask_key, eps_key)
        super().__init__("robust", name, probe, stages, strict=strict)
        self.attacks = _named(attacks)
        if max_samples < 1 or examples < 0:
            raise ValueError(
                f"max_samples= must be at least 1 and examples= not negative, got {max_samples} and {examples}."
            )
        if any(isinstance(attack, NFGSM) for attack in self.attacks.values()):
            warnings.warn(
                "NFGSM is a training attack that may go three times as far as eps; measure with PGD on the same threat "
                "model.",
                stacklevel=2,
            )
        self.max_samples, self.examples, self.seed = max_samples, examples, seed
        self.curve, self.calibration, self.metrics = _radii(curve, self.attacks), calibration, metrics or {}
        self.groups = None if group_key is None else Groups(group_key)
        self.masking = masking
        self._diagnosis: MaskingReport | None = None
        self._under: dict[int, UnderAttack] = {}
        self._scores: dict[int, SampleScores] = {}
        self._pictures: list[tuple[Tensor, ...]] = []
        self._checked = False

    def settings(self) -> Mapping[str, Any]:
        own = {"max_samples": self.max_samples, "stages": ", ".join(self.stages), "seed": self.seed}
        return {**self.attacks, **own, **({"curve": self.curve} if self.curve else {})}

    # -- when ----------------------------------------------------------------------------------------------------

    def attach(self, trainer: Any, pl_module: Any) -> None:
        super().attach(trainer, pl_module)
        self._checked = False  # another fit may bring other data

    def headlines(self) -> Sequence[str]:
        return ["accuracy", "clean_accuracy", *(f"accuracy_{name}" for name in self.attacks)]

    def rehearse(self, trainer: Any, step: Step, loader: int, stage: str) -> None:
        with step_context(trainer, stage), self.probe.reading(self.listener.readable(stage)) as reading:
            self._first_batch(trainer, reading, loader)

    def begin(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._scores, self._under, self._pictures, self._diagnosis = {}, {}, [], None

    def before(self, trainer: Any, step: Step, batch_idx: int, loader: int, stage: str) -> None:
        scores = self._scores.setdefault(loader, self._empty())
        index = self.listener.index
        keep = self.listener.counts & (index < self.max_samples)
        if not takes_part(trainer, step.module, index, keep, self.max_samples):
            return
        # The precision of the run, except for autocast: robust accuracy in half precision is no robust accuracy.
        step = self.listener.readable(stage)
        no_autocast = torch.autocast(trainer.strategy.root_device.type, enabled=False)
        with step_context(trainer, stage), no_autocast, self.probe.reading(step) as reading:
            self._first_batch(trainer, reading, loader)
            groups = None if self.groups is None else self.groups.codes(step.batch, len(reading.x))
            self._measure(reading, scores, index, keep, groups, loader, trainer.is_global_zero)
            if self.masking and stage == "test" and self._diagnosis is None and loader == 0:
                self._diagnosis = self._diagnose(reading, index)

    # -- one batch -----------------------------------------------------------------------------------------------

    def _empty(self) -> SampleScores:
        return SampleScores(list(self.attacks), self.max_samples)

    def _measure(
        self, reading: Reading, scores: SampleScores, index: Tensor, keep: Tensor, groups: Any, loader: int, zero: bool
    ) -> None:
        with torch.no_grad():
            clean = reading.read(reading.x)
        if clean.logits.shape[:1] != reading.x.shape[:1]:
            raise ProbeError(
                f"the loss gets {clean.logits.shape[0] if clean.logits.ndim else 'no'} rows for a batch of "
                f"{len(reading.x)} samples, so that rows cannot be told apart by sample. Give logits_fn= that "
                f"returns (N, K, ...) and target_key=."
            )
        keep &= clean.counted().cpu()
        kept, right = index[keep], clean.correct().cpu()
        under = self._under.setdefault(loader, self._measured_under())
        batch = AttackedBatch(reading, clean, index, self.seed, to_the_end=under.counts_anything)
        labels = clean.labels().cpu()[keep] if batch.single else None
        groups = None if groups is None else groups[keep]
        scores.add_clean(kept, right[keep], reading.x[keep.to(reading.x.device)], labels, groups)
        under.update("clean", clean, keep)
        for name, attack in self.attacks.items():
            perturbed, attacked = batch.run(attack)
            scores.add_attack(name, kept, attacked.correct().cpu()[keep])
            under.update(name, attacked, keep)
            self._add_radii(batch, scores, attack, perturbed, attacked, keep)
            if zero and loader == 0 and name == next(iter(self.attacks)) and len(self._pictures) < self.examples:
                self._keep_pictures(attack, reading.x, perturbed, clean, attacked)
        holds = clean.correct() > 0
        for radius in self.curve:  # small ones first: what falls to one falls to all that are larger
            attack = at_radius(next(iter(self.attacks.values())), radius)
            perturbed, attacked = batch.run(attack, holds)
            self._add_radii(batch, scores, attack, perturbed, attacked, keep)
            holds = holds & (attacked.correct() > 0)

    def _measured_under(self) -> UnderAttack:
        return UnderAttack(["clean", *self.attacks], self.metrics, self.calibration)

    @staticmethod
    def _add_radii(
        batch: AttackedBatch, scores: SampleScores, attack: Any, perturbed: Tensor, attacked: LossCall, keep: Tensor
    ) -> None:
        radii = batch.radii(attack, perturbed, attacked)
        if radii is not None:
            scores.add_radius(batch.index[keep], radii[keep])

    def _diagnose(self, reading: Reading, index: Tensor) -> MaskingReport | None:
        attack = next((a for a in self.attacks.values() if getattr(a, "threat", None) is not None), None)
        if attack is None or is_sharded(reading.module):
            self.warn_once(
                "masking= diagnoses nothing: it needs an attack with a threat model, on a model that is not sharded."
            )
            return None
        rows = torch.arange(min(256, len(reading.x)), device=reading.x.device)
        part = reading.at(rows) if len(rows) < len(reading.x) and reading.divisible else reading
        threat = part.threat(attack.threat).widened()
        return diagnose(part.logits, part.x, part.y, threat, objective=part, generator=seeded(self.seed, int(index[0])))

    def _keep_pictures(self, attack: Any, x: Tensor, perturbed: Tensor, clean: LossCall, attacked: LossCall) -> None:
        if x.ndim != 4 or clean.predictions().shape != x.shape[:1]:
            return  # no pictures, or no single prediction a picture
        threat = getattr(attack, "threat", None)
        space: PixelSpace = PixelSpace() if threat is None else threat.pixels
        rows = (
            space.to_pixels(x),
            space.to_pixels(perturbed),
            clean.labels(),
            clean.predictions(),
            attacked.predictions(),
        )
        self._pictures += list(zip(*(r.detach().cpu() for r in rows), strict=True))

    # -- one epoch -----------------------------------------------------------------------------------------------

    def finish(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # Every process goes through all loaders: what is summed must be summed by all of them.
        for loader, suffix in enumerate(suffixes(trainer)):
            scores = self._scores.get(loader) or self._empty()
            scores.load(self.summed(trainer, pl_module, scores.state()))
            if not scores.n:
                continue
            if self.groups is not None:
                self.groups.share(trainer)
            values = {**scores.accuracies(), **summary(scores, self.curve, self.groups)}
            under = self._under.get(loader) or self._measured_under()
            if under.counts_anything:
                values |= under.compute(self.summed(trainer, pl_module, under.state()))
            self.log_values(pl_module, {self.key(stage, m) + suffix: v for m, v in values.items()}, scores.n)
            if loader == 0:
                if self.curve and trainer.is_global_zero:
                    title = f"{stage}, step {trainer.global_step}"
                    picture = curve_picture(scores, self.curve, *next(iter(self.attacks.items())), title)
                    show_image(trainer, self.key(stage, "curve"), picture)
                if stage == "val":
                    self.record(trainer, self._measured(scores))
        self._report_masking(trainer, pl_module, stage)
        self._show_pictures(trainer, stage)
        self._scores, self._under, self._pictures = {}, {}, []

    def _measured(self, scores: SampleScores) -> dict[str, Any]:
        accuracies = scores.accuracies()
        attacks = {
            name: {
                "settings": repr(attack),
                "n": scores.n,
                "accuracy": accuracies[f"accuracy_{name}"],
                "correct": pack_bits(scores.correct(name) == 1),
            }
            for name, attack in self.attacks.items()
        }
        clean = {"clean_accuracy": accuracies["clean_accuracy"], "clean_correct": pack_bits(scores.correct() == 1)}
        entry = {"attacks": attacks, "n": scores.n, **clean, "sample_ids": scores.sample_ids}
        entry["classes"] = {str(part): list(found) for part, found in scores.by("class").items()}
        if self.groups is not None:
            entry["groups"] = {self.groups.name(part): list(found) for part, found in scores.by("group").items()}
        if self.curve:
            entry["curve"] = {"radii": list(self.curve), "accuracy": scores.holding(self.curve)}
        return entry

    def _report_masking(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if not (self.masking and stage == "test"):
            return
        report = self._diagnosis
        if report is not None and report.findings:
            show_text(trainer, self.key(stage, "masking"), str(report))
        if report is not None and report.suspicious:
            said = " ".join(finding.says for finding in report.findings if finding.suspicious)
            self.warn_once(f"this robust accuracy may be an artefact (gradient masking): {said}")
        # Each process diagnosed a batch of its own; one may have had too few samples for it.
        found = {} if report is None else report.values()
        suspicions = 0 if report is None else sum(finding.suspicious for finding in report.findings)
        own = [bool(found), suspicions, *(found.get(check, 0.0) for check in CHECKS)]
        reports, total, *sums = self.summed(trainer, pl_module, torch.tensor(own, dtype=torch.float64)).tolist()
        if reports:
            values = {f"masking/{check}": value / reports for check, value in zip(CHECKS, sums, strict=True)}
            values["masking_suspicions"] = total
            self.log_values(pl_module, {self.key(stage, name): value for name, value in values.items()}, 1)

    def _show_pictures(self, trainer: Any, stage: str) -> None:
        if not self._pictures or not trainer.is_global_zero:
            return
        clean, perturbed, labels, before, after = (
            torch.stack(c) for c in zip(*self._pictures[: self.examples], strict=True)
        )
        threat = getattr(next(iter(self.attacks.values())), "threat", None)
        bounds = None if threat is None else threat.pixels.bounds
        bounds = bounds or (float(clean.min()), max(float(clean.max()), float(clean.min()) + 1e-6))
        picture = attack_strips(clean, perturbed, labels, before, after, bounds)
        show_image(trainer, self.key(stage, "examples"), picture)

    # -- the first batch -----------------------------------------------------------------------------------------

    def _first_batch(self, trainer: Any, reading: Reading, loader: int) -> None:
        if self._checked:
            return
        self._checked = True
        for attack in self.attacks.values():
            if getattr(attack, "threat", None) is not None:
                reading.threat(attack.threat).pixels.check(reading.x)
        self.say(
            trainer,
            f"RobustAccuracy: {', '.join(self.attacks)} on the first {self.max_samples} samples of each loader; "
            f"{reading.found}.",
        )
        if isinstance(getattr(evaluation_loaders(trainer)[loader][1], "sampler", None), RandomSampler):
            warnings.warn(
                "the evaluation loader shuffles, so that each epoch attacks other samples and numbers of different "
                "epochs or checkpoints cannot be compared; use shuffle=False.",
                stacklevel=2,
            )


def _named(attacks: Any) -> dict[str, Any]:
    listed = attacks if isinstance(attacks, (list, tuple)) else [attacks]
    if isinstance(attacks, Mapping):
        pairs = [(str(name), attack) for name, attack in attacks.items()]
    else:
        pairs = [
            (str(getattr(a, "name", None) or getattr(a, "__name__", type(a).__name__.lower())).strip("<>"), a)
            for a in listed
        ]
    names = [name for name, _ in pairs]
    if not pairs or len(set(names)) < len(names):
        raise ValueError(
            f"RobustAccuracy needs attacks with different names, got {names}; name them: {{'strong': PGD(...), ...}}."
        )
    for name, attack in pairs:
        if not callable(attack):
            raise TypeError(
                f"attack {name!r} must be a callable (logits_fn, x, y) -> x_adv, got {type(attack).__name__}."
            )
    return dict(pairs)


def _radii(curve: Sequence[float], attacks: Mapping[str, Any]) -> tuple[float, ...]:
    """Radii of a curve, increasing.

    Raises:
        ValueError: If a radius is not positive, or the first attack has no radius.
    """
    if not curve:
        return ()
    first = next(iter(attacks.values()))
    if not isinstance(getattr(first, "threat", None), ThreatModel):
        raise ValueError(
            "curve= changes the radius of the first attack, which must have a ThreatModel as its `threat`."
        )
    if not all(radius > 0 for radius in curve):
        raise ValueError(f"curve= takes radii above 0 in pixel units, got {list(curve)}.")
    return tuple(sorted(float(radius) for radius in curve))
