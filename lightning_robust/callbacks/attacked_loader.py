"""One evaluation loader under attack: what is found of its samples, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attach.attacked import AttackedBatch, at_radius
from lightning_robust.attach.reading import Reading
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.attacks import ThreatModel
from lightning_robust.losses import LossCall
from lightning_robust.metrics import SampleScores, UnderAttack
from lightning_robust.pixels import PixelSpace

__all__ = ["AttackedLoader"]


class AttackedLoader:
    """Right and wrong sample by sample, other metrics, and a few pictures.

    Args:
        attacks: By name; the first one is that of the curve and of the pictures.
        curve: Radii, increasing.
        metrics: torchmetrics objects by name.
        calibration: Whether confidence and calibration error are measured.
        seed: Of the attacks.
        capacity: How many samples there can be.

    Attributes:
        scores: Of each sample.
        under: The other metrics.
        pictures: Clean, attacked, label and both predictions of a sample each.
    """

    def __init__(
        self,
        attacks: Mapping[str, Any],
        curve: Sequence[float],
        metrics: Mapping[str, Any],
        calibration: bool,
        seed: int,
        capacity: int,
    ) -> None:
        self.attacks, self.curve, self.seed = attacks, curve, seed
        self.scores = SampleScores(list(attacks), capacity)
        self.under = UnderAttack(["clean", *attacks], metrics, calibration)
        self.pictures: list[tuple[Tensor, ...]] = []

    def add(
        self, reading: Reading, index: Tensor, keep: Tensor, groups: Tensor | None = None, pictures: int = 0
    ) -> None:
        """Attack a batch.

        Args:
            reading: The batch.
            index: Number of each sample among all, ``(N,)``.
            keep: Which samples count, ``(N,)``.
            groups: The group of each sample, ``(N,)``.
            pictures: How many are wanted in all.

        Raises:
            ProbeError: If rows of the logits are not the samples.
            ValueError: If a curve is asked for where a sample has several predictions.
        """
        if not bool(keep.all()) and reading.divisible:
            rows = keep.nonzero().squeeze(1)
            reading, index = reading.at(rows.to(reading.x.device)), index[rows]
            groups, keep = None if groups is None else groups[rows], keep[rows]
        with torch.no_grad():
            clean = reading.read(reading.x)
        if clean.logits.shape[:1] != reading.x.shape[:1]:
            raise ProbeError(
                f"the loss gets {clean.logits.shape[0] if clean.logits.ndim else 'no'} rows for a batch of "
                f"{len(reading.x)} samples, so that rows cannot be told apart by sample. Give logits_fn= that "
                f"returns (N, K, ...) and target_key=."
            )
        batch = AttackedBatch(reading, clean, index, self.seed, to_the_end=self.under.counts_anything)
        if self.curve and not batch.single:
            raise ValueError(
                f"curve= counts samples that are fooled, but here each has {clean.labels()[0].numel()} predictions (of "
                "labels or pixels), some of which may still be right. Leave it out, or measure at several radii: "
                "attacks=[PGD(ThreatModel(norm, eps)) for eps in ...]."
            )
        keep = keep & clean.counted().cpu()
        kept, right = index[keep], clean.correct().cpu()
        labels = clean.labels().reshape(len(reading.x)).cpu()[keep] if batch.single else None
        groups = None if groups is None else groups[keep]
        self.scores.add_clean(kept, right[keep], reading.x[keep.to(reading.x.device)], labels, groups)
        self.under.update("clean", clean, keep)
        first = next(iter(self.attacks.values()))
        for name, attack in self.attacks.items():
            perturbed, attacked = batch.run(attack)
            self.scores.add_attack(name, kept, attacked.correct().cpu()[keep])
            self.under.update(name, attacked, keep)
            if self.curve and _comparable(attack, first):
                self._add_radii(batch, attack, perturbed, attacked, keep)
            if attack is first and len(self.pictures) < pictures and batch.single and reading.x.ndim == 4:
                self._keep_pictures(attack, reading.x, perturbed, clean, attacked)
        holds = clean.correct() > 0
        for radius in self.curve:  # small ones first: what falls to one falls to all that are larger
            attack = at_radius(first, radius)
            perturbed, attacked = batch.run(attack, holds)
            self._add_radii(batch, attack, perturbed, attacked, keep)
            holds = holds & (attacked.correct() > 0)

    def _add_radii(
        self, batch: AttackedBatch, attack: Any, perturbed: Tensor, attacked: LossCall, keep: Tensor
    ) -> None:
        radii = batch.radii(attack, perturbed, attacked)
        if radii is not None:
            self.scores.add_radius(batch.index[keep], radii[keep])

    def _keep_pictures(self, attack: Any, x: Tensor, perturbed: Tensor, clean: LossCall, attacked: LossCall) -> None:
        threat = getattr(attack, "threat", None)
        space: PixelSpace = PixelSpace() if threat is None else threat.pixels
        pictures = (space.to_pixels(x), space.to_pixels(perturbed))
        said = (part.reshape(len(x)) for part in (clean.labels(), clean.predictions(), attacked.predictions()))
        self.pictures += list(zip(*(part.detach().cpu() for part in (*pictures, *said)), strict=True))


def _comparable(attack: Any, other: Any) -> bool:
    """Whether distances of two attacks are of one kind: a norm, and units."""
    one, two = getattr(attack, "threat", None), getattr(other, "threat", None)
    if not isinstance(one, ThreatModel) or not isinstance(two, ThreatModel):
        return False
    return one.norm == two.norm and one.pixels == two.pixels
