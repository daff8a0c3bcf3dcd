"""One snapshot of one probe set: maps by every method, how far they moved, where they lie, and pictures of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attach.compiled import is_compiled
from lightning_robust.attach.reading import Reading
from lightning_robust.attach.sharded import is_sharded
from lightning_robust.callbacks.explainer import CHUNK, Explainer
from lightning_robust.callbacks.probe_sets import without_channel
from lightning_robust.callbacks.watched_probes import WatchedProbes
from lightning_robust.saliency import Film, filmstrip
from lightning_robust.saliency.cascade import Cascade, cascading_randomisation
from lightning_robust.saliency.concentration import concentration, mass, region_named
from lightning_robust.saliency.drift import drift
from lightning_robust.saliency.ensemble import ensemble
from lightning_robust.saliency.filmstrip import seen_as, shrunk
from lightning_robust.saliency.overlays import overlays
from lightning_robust.saliency.permutation import permuted
from lightning_robust.saliency.quality import attack_overlap, quality
from lightning_robust.saliency.sanity import insensitive, means, with_noise

__all__ = ["ENSEMBLE", "Photographer", "Taken"]

ENSEMBLE = "ensemble"
STAGES = 6  # of a cascade: as many explanations
RADIUS = 0.02  # of the range: noise that nobody sees


@dataclass
class Taken:
    """What a snapshot of a probe set gave; a name is ``{method}/{metric}``, or ``/{metric}`` for all methods together.

    Attributes:
        values: Metrics by name.
        pictures: ``(3, H, W)`` by name.
        moved: Metrics by method, for the record.
        tables: Cascades of randomised weights, as Markdown, by name.
    """

    values: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, Tensor] = field(default_factory=dict)
    moved: dict[str, dict[str, float]] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Photographer:
    """How snapshots are taken.

    Attributes:
        explainer: Makes the maps.
        classes: Names of classes, for pictures.
        combined: Whether there are maps of all methods together.
        quality: Whether deletion, insertion and sensitivity are measured.
        sanity: Whether null and noise floor are measured at the anchor.
        seed: Of noise and permutations.
        warn: Says a sentence once.
    """

    explainer: Explainer
    classes: Any
    combined: bool
    quality: bool
    sanity: bool
    seed: int
    warn: Callable[[str], None]

    def take(
        self,
        reading: Reading,
        watched: WatchedProbes,
        x: Tensor,
        caption: str,
        *,
        clean: Tensor | None = None,
        draw: bool = True,
        cascade: bool = False,
    ) -> Taken:
        """Explain the probes and add the maps to their films.

        Args:
            reading: What reads other inputs.
            watched: The probe set.
            x: Its inputs on the device, perhaps attacked.
            caption: When it is.
            clean: The inputs before the attack, where there is one.
            draw: Whether pictures are wanted.
            cascade: Whether the weights are to be taken from the module layer by layer.
        """
        probes, taken = watched.probes, Taken()
        if probes is None:
            return taken
        self.explainer.check_pixels(x)
        target = probes.label.to(x.device)
        if not is_sharded(reading.module) and not is_compiled(reading.module):  # which would be compiled anew
            reading.module.requires_grad_(False)  # until the reading ends: a seventh less work
        with torch.no_grad():
            call = reading.read(x)
        call.check_classes(target)
        predictions = call.predictions().flatten().cpu()
        if watched.first_seen is None:
            watched.first_seen = predictions
        taken.values["/flips"] = float((predictions != watched.first_seen).float().mean())

        found = self._maps(reading, x, target)
        if ENSEMBLE in found:
            together = ensemble({name: maps for name, maps in found.items() if name != ENSEMBLE})
            taken.values["/agreement"] = float(together.agreement.mean())
        uncalibrated = [name for name in found if not len(watched.films.setdefault(name, Film()))]
        reference = self._reference(reading, x, target) if uncalibrated and self.sanity else None
        for method, maps in found.items():
            film = watched.films[method]
            moved = film.add(caption, _small(maps))
            if reference is not None and method in uncalibrated:
                self._calibrate(film, method, maps, *(others.get(method) for others in reference))
            moved |= film.skills(moved)
            taken.moved[method] = moved
            values = {**moved, **self._places(maps, probes.region), **self._quality(method, reading, x, target, clean)}
            taken.values |= {f"{method}/{metric}": value for metric, value in values.items()}
            if cascade and method != ENSEMBLE and not is_sharded(reading.module):
                taken.tables[f"{method}/cascade"] = str(self._cascade(method, reading, x, target))
            if draw and x.ndim == 4:
                self._draw(taken, method, x, probes.label, predictions, call, film)
        return taken

    def _maps(self, reading: Reading, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        explained = ((name, self.explainer.maps(name, reading, x, target)) for name in self.explainer.methods)
        found = {name: maps for name, maps in explained if maps is not None}
        if self.combined and len(found) > 1:
            found[ENSEMBLE] = ensemble(found).mean
        return found

    def _reference(self, reading: Reading, x: Tensor, target: Tensor) -> tuple[Mapping[str, Tensor], ...] | None:
        """Maps by permuted weights, and of noisy inputs."""
        if is_sharded(reading.module):
            self.warn("a sharded module's weights cannot be permuted in place: drift has no null and no skill.")
            return None
        with permuted(reading.module, self.seed):
            null = self._maps(reading, x, target)
        noisy = with_noise(x, spread=self._spread(x), seed=self.seed)
        return null, self._maps(reading, noisy, target)

    def _spread(self, x: Tensor) -> Tensor | None:
        """The range of pixels, as the model gets them."""
        pixels = self.explainer.space(x)
        if pixels.bounds is None:
            return None
        low, high = (pixels.to_model(torch.full_like(x[:1], end)) for end in pixels.bounds)
        return high - low

    def _calibrate(self, film: Film, method: str, maps: Tensor, null: Tensor | None, disturbed: Tensor | None) -> None:
        if null is None or disturbed is None:
            return
        film.calibrate(_small(null), _small(disturbed))
        shown = maps.flatten(1).amax(1) > maps.flatten(1).amin(1)  # two empty maps are the same, whatever the weights
        low, high = (means(drift(other[shown], maps[shown])) for other in (null, disturbed))
        if bool(shown.any()) and insensitive(low, high):
            self.warn(
                f"{method} hardly looks at the weights: its maps by permuted weights overlap with those of the model "
                f"by {low['iou10']:.2f}, those of inputs with a little noise by {high['iou10']:.2f}. Nothing can be "
                "read off how they drift; use another method."
            )

    def _places(self, maps: Tensor, region: Tensor | None) -> dict[str, float]:
        values = means(concentration(maps))
        values["empty"] = float((maps.flatten(1).amax(1) == maps.flatten(1).amin(1)).float().mean())
        if maps.ndim == 3:
            for name in ("border", "corners"):
                values[f"mass_on_{name}"] = float(mass(maps, region_named(name, maps.shape)).mean())
        if region is not None:
            values["mass_in_region"] = float(mass(maps, without_channel(region, maps)).mean())
        return values

    def _quality(
        self, method: str, reading: Reading, x: Tensor, target: Tensor, clean: Tensor | None
    ) -> dict[str, float]:
        if method == ENSEMBLE or not (self.quality or clean is not None):
            return {}

        explain = self._explain(method, reading, target)
        found: dict[str, Tensor] = {}
        if self.quality:
            scores, spread = self.explainer.scores(reading), self._spread(x)
            radius = RADIUS * (x.amax(0, keepdim=True) - x.amin(0, keepdim=True) if spread is None else spread)
            found |= quality(
                explain,
                scores,
                x,
                target,
                baseline=self.explainer.black(x),
                radius=radius,
                chunk_size=CHUNK,
                seed=self.seed,
            )
        if clean is not None:
            hit = attack_overlap(explain(clean), clean, x)
            found |= {f"attack_{name}": value for name, value in hit.items()}
        return means(found)

    def _explain(self, method: str, reading: Reading, target: Tensor) -> Callable[[Tensor], Tensor]:
        def explain(inputs: Tensor) -> Tensor:
            maps = self.explainer.maps(method, reading, inputs, target)
            if maps is None:
                raise ValueError(f"{method} explained these inputs once, and does not explain them again.")
            return maps

        return explain

    def _cascade(self, method: str, reading: Reading, x: Tensor, target: Tensor) -> Cascade:
        explain = self._explain(method, reading, target)
        return cascading_randomisation(
            reading.module, explain, x, seed=self.seed, spread=self._spread(x), stages=STAGES
        )

    def _draw(
        self, taken: Taken, method: str, x: Tensor, labels: Tensor, predictions: Tensor, call: Any, film: Film
    ) -> None:
        pixels = self.explainer.space(x)
        images = shrunk(pixels.to_pixels(x.detach().float()).cpu())  # as the maps of the film
        low, high = pixels.bounds or (float(images.min()), float(images.max()))
        bounds = (low, max(high, low + 1e-6))
        sure = call.log_probabilities().flatten(1).amax(1).exp().cpu()
        shown = film.shown()
        taken.pictures[f"{method}/filmstrip"] = filmstrip(
            images, labels, predictions, sure, shown, bounds, self.classes
        )
        lines = seen_as(labels, predictions, sure, self.classes)
        right = (labels == predictions).tolist()
        taken.pictures[f"{method}/overlays"] = overlays(images, shown[-1][1], lines, right, bounds)


def _small(maps: Tensor) -> Tensor:
    """Maps of pictures averaged down to 223 pixels a side at most, in which films are kept and compared."""
    return shrunk(maps[:, None])[:, 0] if maps.ndim == 3 else maps
