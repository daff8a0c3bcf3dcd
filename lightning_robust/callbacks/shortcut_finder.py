"""Whether predictions rest on what should not matter: clusters of the validation set's saliency maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attach.base import show_or_save
from lightning_robust.attach.batches import Key, as_path, described, get, one_input
from lightning_robust.attach.ending import is_last_evaluation
from lightning_robust.attach.listener import Heard, step_context
from lightning_robust.attach.monitor import Monitor
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.reading import Reading
from lightning_robust.attach.sharded import is_sharded
from lightning_robust.attach.step import Step
from lightning_robust.callbacks.explainer import CHUNK, Explainer, submodule
from lightning_robust.callbacks.kept_samples import Kept, Table, rows_of, small
from lightning_robust.pixels import PixelSpace
from lightning_robust.saliency.cluster_strips import cluster_strips
from lightning_robust.saliency.methods import as_method
from lightning_robust.saliency.shortcuts import OUTSIDE, Cluster, find_shortcuts

__all__ = ["ShortcutFinder"]

FEWEST, MOST = 3, 5000  # samples that make clusters, in reasonable time


class ShortcutFinder(Monitor):
    """Cluster the saliency maps of evaluation samples, and say which clusters look where no object is.

    A model that has found a watermark is right in validation, where the watermark is as well. But the samples that it
    recognises by it are explained alike, and show as one cluster. The first ``max_samples`` samples of the first
    loader are explained after the last batch, with the weights that evaluation measures, in eval mode; the training run
    does not change by a bit. What is explained is the *predicted* class: a shortcut is what a prediction rests on,
    right or wrong. See :func:`~lightning_robust.saliency.shortcuts.find_shortcuts` for when a cluster is flagged.

    Logs, under ``saliency/val_shortcuts/`` (or ``test_shortcuts``): ``clusters``, ``flagged`` (how many of them),
    ``flagged_samples`` (share of the samples in those), and of the most suspicious cluster ``top_suspicion``,
    ``top_size``, ``top_error_rate``, ``top_mass_on_border``, ``top_mass_on_corners`` and, with ``foreground_key``,
    ``top_mass_outside_foreground``. The picture ``clusters`` has a row for each, the most suspicious first.

    What it cannot see: a shortcut amid the objects, if there is no ``foreground_key``, is a cluster like others (look
    at the picture). One that reaches over several tiles may leave no trace, one as dark as what hides the tiles (black)
    has no mass. Nothing flagged is no proof that there is nothing.

    Args:
        method: ``"hidden_tiles"`` (:func:`~lightning_robust.saliency.hidden_tiles.hidden_tiles`), or what
            ``SaliencySnapshots`` takes: a name, a function ``(logits_fn, x, target) -> maps``, or an attribution of
            captum; for tiles of another size ``functools.partial(hidden_tiles, tiles=14)``. Gradients spread over the
            picture whatever the answer rests on; clusters of theirs are rarely flagged.
        max_samples: How many samples are explained. Hidden tiles cost 50 forwards for each.
        every_n_epochs: Also in each epoch of ``fit`` that this divides; else in the last one only, as far as the
            Trainer knows it by then. Outside of ``fit`` always.
        foreground_key: Where in the batch masks are, ``(N, H, W)`` or ``(N, C, H, W)``, 1 on the object; for the mass
            outside.
        border: Width of the border, as a share of the picture's; at least that of a tile.
        pixels: The pixel space of the inputs: for pictures, and black, which hides.
        layer: Name of the submodule that class activation maps look at; found by default.
        classes: Names of the classes, for the pictures.
        stages: ``"val"`` (in ``fit`` and ``validate``), ``"test"``, or both.
        seed: Of the clustering.
        input_key: Where in the batch the input is, if it cannot be told.
        target_key: Where the target is, if no loss tells.
        logits_fn: ``(module, batch) -> logits`` where no loss can be read; needs ``target_key``.
        loss_index: Which loss call of the step is read, 0 for the first.
        strict: Raise whenever measuring fails; else a failure in the middle of a run is said once, its metrics are
            logged as NaN, and the run goes on.
        name: Tells two callbacks of this class apart: keys start with ``saliency.{name}``.

    Attributes:
        found: The clusters of the last evaluation, by stage.

    Raises:
        ValueError: If there is no such method, or a number is out of range.

    Example:
        >>> ShortcutFinder(max_samples=200).key("val", "flagged")
        'saliency/val_shortcuts/flagged'

    References:
        Lapuschkin et al., 2019, https://arxiv.org/abs/1902.10178 (spectral relevance analysis).
    """

    def __init__(
        self,
        method: str | Callable[..., Any] = "hidden_tiles",
        *,
        max_samples: int = 500,
        every_n_epochs: int | None = None,
        foreground_key: Key | None = None,
        border: float = 1 / 7,
        pixels: PixelSpace | None = None,
        layer: str | None = None,
        classes: Sequence[str] | None = None,
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
        if not FEWEST <= max_samples <= MOST or (every_n_epochs is not None and every_n_epochs < 1):
            raise ValueError(
                f"ShortcutFinder needs max_samples= from {FEWEST} to {MOST} (clustering takes their cube of time) and "
                f"every_n_epochs= of at least 1 (None: the last evaluation alone), got {max_samples} and "
                f"{every_n_epochs}."
            )
        if not 0 < border < 0.5:
            raise ValueError(f"border= is a share of the picture's width, above 0 and below 0.5; got {border}.")
        self.method, function = as_method(method)
        self.max_samples, self.every_n_epochs, self.border, self.seed = max_samples, every_n_epochs, border, seed
        self.pixels, self.layer, self.classes = pixels or PixelSpace(), layer, classes
        self.foreground_path = None if foreground_key is None else as_path(foreground_key)
        self.found: dict[str, list[Cluster]] = {}
        self._explainer = Explainer({self.method: function}, layer, self.pixels, seed, self.warn_once)
        self._due = self._ran = False
        self._foreground: Tensor | None = None  # of the present batch
        self._kept: list[Kept] = []
        self._shape: torch.Size | None = None  # of one input
        self._rows: list[Tensor] = []

    def key(self, stage: str, metric: str) -> str:
        return super().key(f"{stage}_shortcuts" if stage in ("val", "test") else stage, metric)

    def settings(self) -> Mapping[str, Any]:
        return {"method": self.method, "max_samples": self.max_samples, "border": self.border, "seed": self.seed}

    def section(self) -> Mapping[str, Any]:
        return {}  # the section of this area belongs to the snapshots

    def restore(self, entry: Mapping[str, Any]) -> None:
        """Nothing is kept in checkpoints: clusters are found anew."""

    # -- when ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._explainer.forget()
        self._ran = False

    def attach(self, trainer: Any, pl_module: Any) -> None:
        super().attach(trainer, pl_module)
        if self.layer is not None:
            submodule(pl_module, self.layer)  # fails now, not after the last epoch

    def headlines(self) -> Sequence[str]:
        return ["clusters", "flagged", "flagged_samples", "top_suspicion", "top_mass_on_border", "top_error_rate"]

    def rehearse(self, trainer: Any, step: Step, loader: int, stage: str) -> None:
        if loader == 0:
            self._foreground_of(step)

    def begin(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._kept, self._rows, self._shape, self._foreground = [], [], None, None
        self._due = self._is_due(trainer)
        self._ran |= self._due
        if self._due and trainer.world_size > 1 and is_sharded(pl_module):
            self._due = False
            self.warn_once(
                "the module is sharded, and processes would run different numbers of forwards; nothing is explained. "
                "Run Trainer.validate with this callback on one device."
            )

    def before(self, trainer: Any, step: Step, batch_idx: int, loader: int, stage: str) -> None:
        if self._due and loader == 0:
            self._foreground = self._foreground_of(step)  # now: steps may write into their batch

    def hear(self, trainer: Any, pl_module: Any, heard: Heard, loader: int, stage: str) -> None:
        if not self._due or loader:
            return
        x, labels = heard.x, heard.call.labels()
        why = _unfit(x, labels)
        if why:
            self.warn_once(f"{why} Nothing is explained.", "unfit")
            self._due = False
            return
        self._shape = x.shape[1:]
        counts = heard.counts & (heard.index < self.max_samples) & heard.call.counted().flatten().cpu()
        predictions = heard.call.predictions().flatten()
        for rows in torch.split(counts.nonzero()[:, 0], CHUNK):
            if len(rows):
                self._kept.append(
                    Kept(
                        index=heard.index[rows],
                        x=x.cpu()[rows],
                        label=labels.flatten().cpu()[rows],
                        prediction=predictions.cpu()[rows],
                        foreground=None if self._foreground is None else self._foreground[rows],
                    )
                )

    def last(self, trainer: Any, template: Step, stage: str) -> None:
        if not self._kept:
            return
        no_autocast = torch.autocast(trainer.strategy.root_device.type, enabled=False)
        with step_context(trainer, stage), no_autocast, self.probe.reading(template) as reading:
            for kept in self._kept:
                explained = self._explained(reading, kept)
                if explained is None:
                    break
                self._rows.append(explained)
        self._kept = []  # inputs are large

    def finish(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if not self._due or self._shape is None:
            return
        masked = self.foreground_path is not None
        table = Table.gathered(
            self._rows, self.max_samples, self._shape, masked, lambda rows: self.summed(trainer, pl_module, rows)
        )
        self._rows = []
        if len(table) < FEWEST:
            self.warn_once(f"{len(table)} samples could be explained, too few to be clustered.")
            return
        self._report(trainer, pl_module, table, stage)

    def _is_due(self, trainer: Any) -> bool:
        divides = self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return divides or is_last_evaluation(trainer)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if "val" in self.stages and trainer.enable_validation and not self._ran:
            self.warn_once(
                "no evaluation of this fit was known to be the last one (EarlyStopping and time limits end a run "
                "without notice), so nothing was looked at. Call trainer.validate(...) with this callback, or give "
                "every_n_epochs=."
            )
        super().on_fit_end(trainer, pl_module)

    # -- what ----------------------------------------------------------------------------------------------------

    def _foreground_of(self, step: Step) -> Tensor | None:
        """Masks ``(N, H, W)`` of a batch, as small as maps are kept."""
        if self.foreground_path is None:
            return None
        masks = get(step.batch, self.foreground_path)
        like = get(step.batch, self.probe.route(step, listening=True).input)
        fits = isinstance(masks, Tensor) and masks.ndim in (3, 4) and len(masks) == len(like)
        if not fits or masks.shape[-2:] != like.shape[-2:]:
            raise ValueError(
                f"foreground_key={self.foreground_path} must lead to masks (N, H, W) or (N, C, H, W) for inputs "
                f"{tuple(like.shape)}, 1 on the object; the batch has {described(step.batch)}."
            )
        masks = masks.detach().float().cpu()
        return small(masks.amax(1, keepdim=True) if masks.ndim == 4 else masks[:, None])[:, 0]

    def _explained(self, reading: Reading, kept: Kept) -> Tensor | None:
        x = kept.x.to(reading.x.device, reading.x.dtype)
        self._explainer.check_pixels(x)
        maps = self._explainer.maps(self.method, reading, x, kept.prediction.to(x.device))
        if maps is None:
            return None
        return rows_of(kept, maps, self.pixels.to_pixels(kept.x))

    def _report(self, trainer: Any, pl_module: Any, table: Table, stage: str) -> None:
        clusters = find_shortcuts(
            table.maps,
            table.labels,
            table.predictions,
            foreground=table.foreground,
            border=self.border,
            seed=self.seed,
        )
        self.found[stage] = clusters
        first, flagged = clusters[0], [cluster for cluster in clusters if cluster.flagged]
        values = {
            "clusters": len(clusters),
            "flagged": len(flagged),
            "flagged_samples": sum(map(len, flagged)) / len(table),
            "top_suspicion": first.suspicion,
            "top_size": len(first),
            "top_error_rate": first.error_rate,
            "top_mass_on_border": first.mass["border"],
            "top_mass_on_corners": first.mass["corners"],
        }
        if OUTSIDE in first.mass:
            values["top_mass_outside_foreground"] = first.mass[OUTSIDE]
        self.log_values(pl_module, {self.key(stage, name): float(v) for name, v in values.items()}, len(table))
        if trainer.is_global_zero:
            images = table.images
            low, high = self.pixels.bounds or (float(images.min()), float(images.max()))
            bounds = (low, max(high, low + 1e-6))
            strips = cluster_strips(
                clusters, table.maps, images, table.labels, table.predictions, bounds, names=self.classes
            )
            show_or_save(trainer, self.key(stage, "clusters"), strips)
        for cluster in flagged:
            self.say(
                trainer,
                f"{stage}: {len(cluster)} of {len(table)} predictions rest on one place, "
                f"{100 * cluster.mass[cluster.place]:.0f} % of their saliency is {cluster.where}: a shortcut?",
            )


def _unfit(x: Tensor, labels: Tensor) -> str | None:
    """Why these samples have no clusters of maps, if they have none."""
    if x.ndim != 4 or not x.is_floating_point():
        return f"maps of pictures (N, C, H, W) can be clustered; the input is {x.dtype} {tuple(x.shape)}."
    if labels.numel() != len(x) or len(labels) != len(x):
        return f"one class a sample can be explained; the loss gets labels {tuple(labels.shape)} for {len(x)} samples."
    return None
