"""Clean and robust accuracy on the same samples, in ``fit``, ``validate`` and ``test``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import RandomSampler

from lightning_robust.attach.base import show_image
from lightning_robust.attach.batches import InputKey, Key
from lightning_robust.attach.checkpoint import pack_bits
from lightning_robust.attach.listener import step_context
from lightning_robust.attach.loaders import evaluation_loaders
from lightning_robust.attach.monitor import Monitor, suffixes
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.reading import Reading
from lightning_robust.attach.sharded import takes_part
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.attacks import NFGSM, PGD
from lightning_robust.losses import LossCall
from lightning_robust.metrics import SampleScores
from lightning_robust.pictures import attack_strips
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import seeded

__all__ = ["RobustAccuracy"]


class RobustAccuracy(Monitor):
    """How often the model is right, and how often it stays right under attack.

    Both numbers are about the same samples: the first ``max_samples`` of each loader, the same in every epoch. A sample
    counts as robust if it is right as it is *and* under every attack. Attacks run in fp32, on random numbers of
    their own that depend on the sample's index alone: neither the batch size nor the number of processes moves a
    result, and the training run does not change by a bit.

    Logs ``robust/val/clean_accuracy``, ``robust/val/accuracy`` (worst case over all attacks) and
    ``robust/val/accuracy_{attack}``, with ``test`` for ``val`` in ``Trainer.test``; of several loaders the first
    keeps these keys and the others add their name or index. Use ``ModelCheckpoint(monitor="robust/val/accuracy",
    mode="max", auto_insert_metric_name=False)`` to keep the most robust weights. For several labels or pixels a sample,
    "right" is the share of them that is right.

    Args:
        attacks: One attack, a list of them, or a dict that names them. Anything ``(logits_fn, x, y) -> x_adv``.
        max_samples: How many samples of each loader are attacked.
        stages: Where to measure: ``"val"`` (every validation, in ``fit`` too), ``"test"``, or both. A cheap attack
            for selection and a strong one for the report are two callbacks with one stage each.
        examples: Rows of the example picture in TensorBoard; 0 for none.
        seed: Of the attacks' random starts.
        input_key: Where in the batch the input is, if it cannot be told; a list for several inputs.
        target_key: Where the target is, if no loss tells.
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
        attacks: PGD
        | NFGSM
        | list[PGD | NFGSM | Callable[..., Any]]
        | dict[str, PGD | NFGSM | Callable[..., Any]]
        | Callable[..., Any],
        *,
        max_samples: int = 1000,
        stages: Sequence[str] = ("val", "test"),
        examples: int = 6,
        seed: int = 0,
        input_key: InputKey | None = None,
        target_key: Key | None = None,
        logits_fn: Callable[..., Any] | None = None,
        loss_index: int = 0,
        strict: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__("robust", name, Probe(input_key, target_key, logits_fn, loss_index), stages, strict=strict)
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
        self._scores: dict[int, SampleScores] = {}
        self._pictures: list[tuple[Tensor, ...]] = []
        self._checked = False

    def settings(self) -> Mapping[str, Any]:
        return {**self.attacks, "max_samples": self.max_samples, "stages": ", ".join(self.stages), "seed": self.seed}

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
        self._scores, self._pictures = {}, []

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
            self._measure(reading, scores, index, keep, pictures=loader == 0 and trainer.is_global_zero)

    # -- one batch -----------------------------------------------------------------------------------------------

    def _empty(self) -> SampleScores:
        return SampleScores(list(self.attacks), self.max_samples)

    def _measure(self, reading: Reading, scores: SampleScores, index: Tensor, keep: Tensor, pictures: bool) -> None:
        with torch.no_grad():
            clean = reading.read(reading.x)
        if clean.logits.shape[:1] != reading.x.shape[:1]:
            raise ProbeError(
                f"the loss gets {clean.logits.shape[0] if clean.logits.ndim else 'no'} rows for a batch of "
                f"{len(reading.x)} samples, so that rows cannot be told apart by sample. Give logits_fn= that "
                f"returns (N, K, ...) and target_key=."
            )
        keep &= clean.counted().cpu()
        kept = index[keep]
        scores.add_clean(kept, clean.correct().cpu()[keep], reading.x[keep.to(reading.x.device)])
        for name, attack in self.attacks.items():
            if isinstance(attack, (PGD, NFGSM)):
                attack = replace(
                    attack,
                    threat=reading.threat(attack.threat).widened(),
                    objective=attack.objective or reading,
                )
            noise = [seeded(self.seed, int(i)) for i in index]
            perturbed = reading.guarded(attack)(reading.logits, reading.x, clean.target, generator=noise)
            with torch.no_grad():
                attacked = reading.read(perturbed)
            scores.add_attack(name, kept, attacked.correct().cpu()[keep])
            if pictures and name == next(iter(self.attacks)) and len(self._pictures) < self.examples:
                self._keep_pictures(self.attacks[name], reading.x, perturbed, clean, attacked)

    def _keep_pictures(self, attack: Any, x: Tensor, perturbed: Tensor, clean: LossCall, attacked: LossCall) -> None:
        if x.ndim != 4 or clean.predictions().shape != x.shape[:1]:
            return  # no pictures, or no single prediction a picture
        space: PixelSpace = attack.threat.pixels if hasattr(attack, "threat") else PixelSpace()
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
            shares = {self.key(stage, metric) + suffix: share for metric, share in scores.accuracies().items()}
            self.log_values(pl_module, shares, scores.n)
            if loader == 0 and stage == "val":
                self.record(trainer, self._measured(scores))
        self._show_pictures(trainer, stage)
        self._scores, self._pictures = {}, []

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
        return {"attacks": attacks, "n": scores.n, **clean, "sample_ids": scores.sample_ids}

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
            if hasattr(attack, "threat"):
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
