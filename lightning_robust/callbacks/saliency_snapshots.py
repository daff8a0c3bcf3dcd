"""What a model looks at, photographed while it trains: filmstrips in TensorBoard and how far the maps drift."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.attach.base import show_image
from lightning_robust.attach.batches import Key, one_input
from lightning_robust.attach.listener import Heard, step_context
from lightning_robust.attach.monitor import Monitor
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.reading import Reading
from lightning_robust.attach.step import Step
from lightning_robust.pixels import PixelSpace
from lightning_robust.saliency import Candidates, Film, ProbeSet, filmstrip, last_feature_map, method_named

__all__ = ["SaliencySnapshots"]


class SaliencySnapshots(Monitor):
    """Explain the same few evaluation samples again and again, and show how the explanations change.

    The probe set is chosen once, from the first evaluation loader: seeded, stratified by class. Every snapshot explains
    the *right* class of each probe, so that a changed prediction does not look like a changed explanation. The first
    snapshot is the anchor. Snapshots are taken after the last evaluation batch, with the weights that evaluation
    measures, in eval mode; the training run does not change by a bit.

    Logs, for each method, ``saliency/val_{method}/iou10_to_anchor`` and ``iou10_to_previous`` (overlap of the 10 % of
    inputs that matter most; dense unrelated maps share about 0.05, maps that are empty wherever the input is share
    more), ``cosine_to_anchor`` and ``cosine_to_previous`` (centred), and ``saliency/val/flips`` (share of probes
    predicted otherwise than at the anchor). TensorBoard's image
    ``saliency/val_{method}/filmstrip`` shows inputs, the maps from first to now, and what changed. Maps (8 bits) and
    drift are kept in every checkpoint; a resumed run goes on with the same anchor. Every run chooses its probe set
    anew; if that is another one (other data), there is a new anchor and a warning.

    Args:
        methods: ``"gradient"``, ``"integrated_gradients"``, ``"gradcam"``.
        every_n_epochs: A snapshot in the first validation, then in each epoch that this divides, and in the last one as
            far as the Trainer knows it by then (``EarlyStopping`` decides later). Outside of ``fit`` always.
        samples: Size of the probe set.
        pixels: The pixel space of the inputs: for pictures, and black as the baseline of integrated gradients.
        layer: Name of the submodule whose output Grad-CAM weighs; by default the last feature map of a convolution.
        classes: Names of the classes, for the pictures.
        stages: ``"val"`` (in ``fit`` and ``validate``), ``"test"``, or both; each has its own probe set.
        seed: Of the probe set.
        input_key: Where in the batch the input is, if it cannot be told.
        target_key: Where the target is, if no loss tells.
        logits_fn: ``(module, batch) -> logits`` where no loss can be read; needs ``target_key``.
        loss_index: Which loss call of the step is read, 0 for the first.
        strict: Raise whenever measuring fails; else a failure in the middle of a run is said once, its metrics are
            logged as NaN, and the run goes on.
        name: Tells two callbacks of this class apart: keys start with ``saliency.{name}``.

    Raises:
        ValueError: If a method is unknown, a number is below 1, or the module has no submodule ``layer``.

    Example:
        >>> SaliencySnapshots(["gradient"], every_n_epochs=5).key("val_gradient", "iou10_to_anchor")
        'saliency/val_gradient/iou10_to_anchor'

    References:
        Simonyan et al., 2014, https://arxiv.org/abs/1312.6034 (gradient). Sundararajan et al., 2017,
        https://arxiv.org/abs/1703.01365 (integrated gradients). Selvaraju et al., 2017,
        https://arxiv.org/abs/1610.02391 (Grad-CAM).
    """

    def __init__(
        self,
        methods: Sequence[str] = ("gradient", "integrated_gradients", "gradcam"),
        *,
        every_n_epochs: int = 1,
        samples: int = 8,
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
        if isinstance(methods, str) or not methods:
            raise ValueError(f"methods= takes a list of methods, got {methods!r}.")
        if every_n_epochs < 1 or samples < 1:
            raise ValueError(f"every_n_epochs= and samples= must be at least 1, got {every_n_epochs} and {samples}.")
        self.methods = {method: method_named(method) for method in methods}
        self.every_n_epochs, self.samples, self.seed = every_n_epochs, samples, seed
        self.pixels, self.layer, self.classes = pixels or PixelSpace(), layer, classes
        self._forget()

    def _forget(self) -> None:
        self._probes: dict[str, ProbeSet] = {}
        self._films: dict[str, dict[str, Film]] = {}
        self._first_seen: dict[str, Tensor] = {}  # predictions at the anchor
        self._history: dict[str, list[dict[str, Any]]] = {}
        # Entries of checkpoints and of earlier runs, until this run has chosen its probe set.
        self._known: dict[str, dict[str, Any]] = {}
        self._candidates: Candidates | None = None
        self._values: dict[str, float] = {}
        self._found_layer: str | None = None
        self._loaded_step = 0  # of the checkpoint; outside of fit the Trainer does not take it over
        self._shape = torch.Size()
        self._warned = set()

    def settings(self) -> Mapping[str, Any]:
        methods = ", ".join(self.methods)
        return {"methods": methods, "samples": self.samples, "every_n_epochs": self.every_n_epochs, "seed": self.seed}

    def section(self) -> Mapping[str, Any]:
        chosen = {
            stage: {
                "hash": probes.hash,
                "indices": probes.index.tolist(),
                "labels": probes.label.tolist(),
                "predictions": self._first_seen[stage].tolist(),
                "films": {method: film.to_dict() for method, film in self._films[stage].items()},
                "drift": self._history[stage],
            }
            for stage, probes in self._probes.items()
            if stage in self._first_seen
        }
        entry = {**self._known, **chosen}
        return {self.area: entry} if entry else {}

    def restore(self, entry: Mapping[str, Any]) -> None:
        self._loaded_step = int(entry.get("global_step", 0))
        for stage, stored in entry.get(self.area, {}).items():
            self._known[stage] = stored
            self._first_seen[stage] = torch.tensor(stored["predictions"])
            self._films[stage] = {method: Film.from_dict(film) for method, film in stored["films"].items()}
            self._history[stage] = list(stored["drift"])
            self._probes.pop(stage, None)

    # -- when ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._forget()  # of another run; a resumed one reads its films from the checkpoint
        else:  # perhaps of another module, on other data: what was chosen is chosen again, and compared
            self._known.update(self.section().get(self.area, {}))
            self._probes, self._found_layer, self._loaded_step = {}, None, 0

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._loaded_step = int(checkpoint.get("global_step", 0))

    def headlines(self) -> Sequence[str]:
        return ["flips"]

    def attach(self, trainer: Any, pl_module: Any) -> None:
        super().attach(trainer, pl_module)
        if self.layer is not None:
            _submodule(pl_module, self.layer)  # fails now, not after the first epoch

    def begin(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._values = {}
        self._candidates = None if stage in self._probes else Candidates(self.samples, self.seed)

    def hear(self, trainer: Any, pl_module: Any, heard: Heard, loader: int, stage: str) -> None:
        if loader or self._candidates is None:
            return
        labels = heard.call.labels()
        if labels.numel() != len(heard.x) or len(labels) != len(heard.x):
            self.warn_once(
                f"one class a sample can be explained; this module's loss gets labels {tuple(labels.shape)} for "
                f"{len(heard.x)} samples. Nothing is photographed."
            )
            self._candidates = None
            return
        self._shape, kept = heard.x.shape[1:], heard.counts & heard.call.counted().cpu()
        self._candidates.offer(heard.index[kept], labels.flatten().cpu()[kept], heard.x.cpu()[kept])

    def last(self, trainer: Any, template: Step, stage: str) -> None:
        if self._candidates is not None:
            self._choose(trainer, template.module, self._candidates, stage)
            self._candidates = None
        if stage not in self._probes or not self._due(trainer, stage):
            return
        no_autocast = torch.autocast(trainer.strategy.root_device.type, enabled=False)
        with step_context(trainer, stage), no_autocast, self.probe.reading(template) as reading:
            self._snapshot(trainer, reading, stage)

    def finish(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.log_values(pl_module, self._values, self.samples)

    def _due(self, trainer: Any, stage: str) -> bool:
        epoch = trainer.current_epoch + 1
        first = not any(map(len, self._films.get(stage, {}).values()))
        last = epoch == trainer.max_epochs or trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
        return first or last or trainer.state.fn != "fit" or epoch % self.every_n_epochs == 0

    # -- what ----------------------------------------------------------------------------------------------------

    def _choose(self, trainer: Any, module: Any, candidates: Candidates, stage: str) -> None:
        if trainer.world_size > 1:
            self._exchange(trainer, module, candidates)
        probes = candidates.chosen()
        if not len(probes):
            return
        known = self._known.pop(stage, None)
        if known is not None and known["hash"] != probes.hash:
            warnings.warn(
                f"earlier snapshots explain other samples than this run's {stage} data (hash {known['hash']}, now "
                f"{probes.hash}); a new anchor is set. Is the loader shuffled, augmented, or of other data?",
                stacklevel=2,
            )
            self._first_seen.pop(stage, None)
            self._films.pop(stage, None)
            self._history.pop(stage, None)
        self._probes[stage] = probes
        self._films.setdefault(stage, {method: Film() for method in self.methods})
        self._history.setdefault(stage, [])

    def _exchange(self, trainer: Any, module: Any, candidates: Candidates) -> None:
        """Every process gets the candidates of all: a table with a place for each, summed."""
        index, label, x = candidates.rows()
        shape = self._shape
        table = torch.zeros(trainer.world_size, 2 * self.samples, 3 + shape.numel(), dtype=torch.float64)
        own = table[trainer.global_rank, : len(index)]
        if len(index):
            own[:, 0], own[:, 1], own[:, 2], own[:, 3:] = 1.0, index, label, x.flatten(1)
        everything = self.summed(trainer, module, table).flatten(0, 1)
        rows = everything[everything[:, 0] == 1]
        candidates.offer(rows[:, 1].long(), rows[:, 2].long(), rows[:, 3:].float().view(-1, *shape))

    def _snapshot(self, trainer: Any, reading: Reading, stage: str) -> None:
        probes = self._probes[stage]
        x, target = probes.x.to(reading.x.device, reading.x.dtype), probes.label.to(reading.x.device)
        with torch.no_grad():
            call = reading.read(x)
        call.check_classes(target)
        predictions = call.predictions().flatten().cpu()
        confidences = call.log_probabilities().flatten(1).amax(1).exp().cpu()
        anchor = self._first_seen.setdefault(stage, predictions)
        self._values[self.key(stage, "flips")] = float((predictions != anchor).float().mean())
        caption, moved = self._moment(trainer)
        for method in self.methods:
            maps = self._maps(method, reading, x, target)
            if maps is None:
                continue
            film = self._films[stage].setdefault(method, Film())
            moved[method] = film.add(caption, maps)
            for name, value in moved[method].items():
                self._values[self.key(f"{stage}_{method}", name)] = value
            if trainer.is_global_zero and x.ndim == 4:
                picture = self._filmstrip(probes, predictions, confidences, film)
                show_image(trainer, self.key(f"{stage}_{method}", "filmstrip"), picture)
        self._history[stage].append(moved)

    def _moment(self, trainer: Any) -> tuple[str, dict[str, Any]]:
        """When it is, for a person and for the checkpoint."""
        step = int(trainer.global_step)
        if trainer.state.fn == "fit":
            return f"epoch {trainer.current_epoch + 1}", {"epoch": trainer.current_epoch + 1, "step": step}
        step = step or self._loaded_step
        return f"step {step}" if step else trainer.state.fn.value, {"step": step}

    def _maps(self, method: str, reading: Reading, x: Tensor, target: Tensor) -> Tensor | None:
        function = self.methods[method]
        if method == "integrated_gradients":
            return function(reading.logits, x, target, baseline=self._black(x))
        if method != "gradcam":
            return function(reading.logits, x, target)
        if x.ndim != 4:
            self.warn_once(f"Grad-CAM explains pictures (N, C, H, W), the input is {tuple(x.shape)}; it is left out.")
            return None
        name = self.layer or self._found_layer
        if name is None:
            with torch.no_grad():
                name = self._found_layer = last_feature_map(reading.module, lambda: reading.read(x))
        if name is None:
            self.warn_once(
                "Grad-CAM needs a feature map (N, C, H, W), and this module has no convolution that gives one: leave "
                "'gradcam' out of methods=, or name a submodule with layer=."
            )
            return None
        return function(reading.logits, x, target, layer=_submodule(reading.module, name))

    def _black(self, x: Tensor) -> Tensor | float:
        if self.pixels.bounds is None:
            return 0.0
        return self.pixels.to_model(torch.full_like(x[:1], self.pixels.bounds[0]))

    def _filmstrip(self, probes: ProbeSet, predictions: Tensor, confidences: Tensor, film: Film) -> Tensor:
        images = self.pixels.to_pixels(probes.x)
        low, high = self.pixels.bounds or (float(images.min()), float(images.max()))
        bounds = (low, max(high, low + 1e-6))
        return filmstrip(images, probes.label, predictions, confidences, film.shown(), bounds, self.classes)


def _submodule(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        names = ", ".join(known for known, _ in module.named_modules() if known)
        raise ValueError(f"layer={name!r} is no submodule of {type(module).__name__}; it has {names}.") from error
