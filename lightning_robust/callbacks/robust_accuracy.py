"""Clean and robust accuracy on the same samples, in ``fit``, ``validate`` and ``test``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attach.base import show_image, show_text
from lightning_robust.attach.batches import InputKey, Key
from lightning_robust.attach.groups import Groups
from lightning_robust.attach.listener import step_context
from lightning_robust.attach.loaders import evaluation_loaders, shuffles
from lightning_robust.attach.monitor import Monitor, suffixes
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.reading import Reading
from lightning_robust.attach.sharded import is_sharded, takes_part
from lightning_robust.attach.step import Step
from lightning_robust.attacks import APGD, FGSM, NFGSM, PGD, AutoAttack, Square, ThreatModel, UniformNoise, WorstCase
from lightning_robust.attacks.masking import CHECKS, MaskingReport, diagnose
from lightning_robust.attacks.rehearsal import shortened
from lightning_robust.callbacks.attacked_loader import AttackedLoader
from lightning_robust.callbacks.robust_summary import curve_picture, entry, summary
from lightning_robust.metrics import SampleScores
from lightning_robust.pictures import attack_strips
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
        max_samples: How many samples of each loader are attacked, at most.
        stages: Where to measure: ``"val"`` (every validation, in ``fit`` too), ``"test"``, or both. A cheap attack
            for selection and a strong one for the report are two callbacks with one stage each.
        curve: Radii in pixel units for accuracy over the radius, of the first attack: ``robust/val/curve/{radius}``, a
            picture, and ``mean_radius``, the mean over all samples of the smallest perturbation found that fools it (0
            where it is wrong anyway, the largest radius where none was found). Others of its norm count there, too.
        calibration: Also log mean confidence and calibration error under each attack: ``confidence_{attack}``,
            ``ece_{attack}``. Attacks then run to their end, since one that stops when a sample is fooled leaves it
            where the model is least sure.
        metrics: torchmetrics objects by name, taking ``(probabilities, labels)``: ``{name}_{attack}``, and
            ``{name}_clean``.
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
        attacks: list[OneAttack] | OneAttack | dict[str, OneAttack],  # jsonargparse takes the first match
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
        if curve and eps_key is not None:
            raise ValueError(
                "curve= tries radii that are the same for all samples, but eps_key= gives each sample its own; "
                "leave one of them out."
            )
        if masking and "test" not in stages:
            raise ValueError(
                f"masking= diagnoses in Trainer.test, but stages={list(stages)} measures in validation alone."
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
        self._loaders: dict[int, AttackedLoader] = {}
        self._checked: set[int] = set()
        self._ids: dict[str, tuple[int, str]] = {}  # which samples were measured last, by key

    def settings(self) -> Mapping[str, Any]:
        own = {"max_samples": self.max_samples, "stages": ", ".join(self.stages), "seed": self.seed}
        return {**self.attacks, **own, **({"curve": self.curve} if self.curve else {})}

    # -- when ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._checked, self._ids = set(), {}  # another run may bring other data

    def headlines(self) -> Sequence[str]:
        return ["accuracy", "clean_accuracy", *(f"accuracy_{name}" for name in self.attacks)]

    def rehearse(self, trainer: Any, step: Step, loader: int, stage: str) -> None:
        with self._reading(trainer, stage) as reading:
            self._first_batch(trainer, reading, loader)
            # Two samples, shortened attacks: what is wrong with settings shows here.
            groups = self.codes(self.groups, step.batch, len(reading.x), loader)
            rows = torch.arange(min(2, len(reading.x)), device=reading.x.device)
            part = reading.at(rows) if reading.divisible else reading
            n = len(part.x)
            attacks = {name: shortened(attack) for name, attack in self.attacks.items()}
            tried = AttackedLoader(attacks, self.curve[:1], self.metrics, self.calibration, self.seed, n)
            tried.add(part, torch.arange(n), torch.ones(n, dtype=torch.bool), None if groups is None else groups[:n])
            if trainer.world_size == 1:
                tried.under.check()

    def begin(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._loaders, self._diagnosis = {}, None

    def before(self, trainer: Any, step: Step, batch_idx: int, loader: int, stage: str) -> None:
        if loader not in self._loaders:
            self._loaders[loader] = self._loader()
        index = self.listener.index
        keep = self.listener.counts & (index < self.max_samples)
        if not takes_part(trainer, step.module, index, keep, self.max_samples):
            return
        with self._reading(trainer, stage) as reading:
            self._first_batch(trainer, reading, loader)
            groups = self.codes(self.groups, step.batch, len(reading.x), loader)
            pictures = self.examples if trainer.is_global_zero and loader == 0 else 0
            self._loaders[loader].add(reading, index, keep, groups, pictures)
            if self.masking and stage == "test" and self._diagnosis is None and loader == 0:
                self._diagnosis = self._diagnose(reading, index)

    # -- one batch -----------------------------------------------------------------------------------------------

    def _loader(self) -> AttackedLoader:
        return AttackedLoader(self.attacks, self.curve, self.metrics, self.calibration, self.seed, self.max_samples)

    @contextmanager
    def _reading(self, trainer: Any, stage: str) -> Iterator[Reading]:
        # The precision of the run, except for autocast: robust accuracy in half precision is no robust accuracy.
        no_autocast = torch.autocast(trainer.strategy.root_device.type, enabled=False)
        with step_context(trainer, stage), no_autocast, self.probe.reading(self.listener.readable(stage)) as reading:
            yield reading

    def _diagnose(self, reading: Reading, index: Tensor) -> MaskingReport | None:
        attack = next((a for a in self.attacks.values() if getattr(a, "threat", None) is not None), None)
        if attack is None or is_sharded(reading.module):
            self.warn_once(
                "masking= diagnoses nothing: it needs an attack with a threat model, on a model that is not sharded."
            )
            return None
        rows = torch.arange(min(256, len(reading.x)), device=reading.x.device)
        part = reading.at(rows) if len(rows) < len(reading.x) and reading.divisible else reading
        threat = part.local(part.threat(attack.threat)).widened()
        return diagnose(part.logits, part.x, part.y, threat, objective=part, generator=seeded(self.seed, int(index[0])))

    # -- one epoch -----------------------------------------------------------------------------------------------

    def finish(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # Every process goes through all loaders: what is summed must be summed by all of them.
        for loader, suffix in enumerate(suffixes(trainer)):
            found = None if loader in self.left_out else self._loaders.get(loader)
            found = found or self._loader()
            scores = found.scores
            size = self.summed(trainer, pl_module, torch.tensor([scores.size], dtype=torch.float64))
            scores.load(self.summed(trainer, pl_module, scores.state(int(size[0]))))
            if not scores.n:
                continue
            if self.groups is not None:
                self.groups.share(trainer)
            values = {**scores.accuracies(), **summary(scores, self.curve, self.groups)}
            if found.under.counts_anything:
                total = self.summed(trainer, pl_module, found.under.state())
                values |= found.under.compute(total, pl_module.device)
            self._compare_samples(scores, self.key(stage, "samples") + suffix)
            self.log_values(pl_module, {self.key(stage, m) + suffix: v for m, v in values.items()}, scores.n)
            if loader == 0:
                if self.curve and trainer.is_global_zero:
                    title = f"{stage}, step {trainer.global_step}"
                    picture = curve_picture(scores, self.curve, *next(iter(self.attacks.items())), title)
                    show_image(trainer, self.key(stage, "curve"), picture)
                if stage == "val":
                    self.record(trainer, entry(scores, self.attacks, self.curve, self.groups))
        self._report_masking(trainer, pl_module, stage)
        self._show_pictures(trainer, stage)
        self._loaders = {}

    def _compare_samples(self, scores: SampleScores, key: str) -> None:
        now, before = (scores.n, scores.sample_ids), self._ids.get(key)
        self._ids[key] = now
        if before is not None and before != now and before[0] == now[0]:
            self.warn_once(
                f"the samples are others than in the last evaluation ({key}): does their loader shuffle, or augment at "
                "random? Numbers of different epochs and checkpoints cannot be compared then.",
                f"samples of {key}",
            )

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
            asked = [check for check in CHECKS if not found or check in found]
            values = {f"masking/{c}": v / reports for c, v in zip(CHECKS, sums, strict=True) if c in asked}
            values["masking_suspicions"] = total
            self.log_values(pl_module, {self.key(stage, name): value for name, value in values.items()}, 1)

    def _show_pictures(self, trainer: Any, stage: str) -> None:
        pictures = self._loaders[0].pictures if 0 in self._loaders else []
        if not pictures or not trainer.is_global_zero:
            return
        clean, perturbed, labels, before, after = (torch.stack(c) for c in zip(*pictures[: self.examples], strict=True))
        threat = getattr(next(iter(self.attacks.values())), "threat", None)
        bounds = None if threat is None else threat.pixels.bounds
        bounds = bounds or (float(clean.min()), max(float(clean.max()), float(clean.min()) + 1e-6))
        picture = attack_strips(clean, perturbed, labels, before, after, bounds)
        show_image(trainer, self.key(stage, "examples"), picture)

    # -- the first batch -----------------------------------------------------------------------------------------

    def _first_batch(self, trainer: Any, reading: Reading, loader: int) -> None:
        if loader in self._checked:
            return
        for attack in self.attacks.values():
            if getattr(attack, "threat", None) is not None:
                reading.threat(attack.threat).pixels.check(reading.x)
        if not self._checked:
            self.say(
                trainer,
                f"RobustAccuracy: {', '.join(self.attacks)} on the first {self.max_samples} samples of each loader; "
                f"{reading.found}.",
            )
        self._checked.add(loader)
        if shuffles(evaluation_loaders(trainer)[loader][1]):
            warnings.warn(
                f"evaluation loader {loader} shuffles, so that each epoch attacks other samples and numbers of "
                "different epochs or checkpoints cannot be compared; use shuffle=False.",
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
