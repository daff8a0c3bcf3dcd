"""Honest probabilities: a temperature for each set of weights, stored in their checkpoint."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_robust._version import __version__
from lightning_robust.attach.checkpoint import rewrite
from lightning_robust.attach.listener import Heard
from lightning_robust.attach.loaders import evaluation_loaders, own_batches, transferred, true_length
from lightning_robust.attach.monitor import Monitor, suffixes
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.route import Route
from lightning_robust.attach.scaling import preferred, routes_in, scale_output, stored_temperature
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.calibration import Reliability, TemperatureFit, fit_temperature
from lightning_robust.metrics import Reservoir
from lightning_robust.randomness import priorities

__all__ = ["TemperatureScaling"]


class TemperatureScaling(Monitor):
    """Fit the temperature that makes confidence honest, for the very weights that are validated.

    It is refitted from the validation logits at the end of every validation epoch (milliseconds, no extra forward) and
    written into every checkpoint saved after it, so that ``best.ckpt`` carries its own:
    :func:`~lightning_robust.load_temperature` reads it, :func:`~lightning_robust.calibrated` loads a module with it.

    Logs ``calibration/val/temperature`` and, cross-fitted (each half of the samples at the temperature of the other),
    ``nll_scaled`` and ``ece_scaled`` with ``ece_scaled_low``, ``ece_scaled_high`` (95 % interval) and
    ``ece_scaled_floor`` (a perfectly calibrated model of this size). ``Trainer.test`` logs the same keys with
    ``test`` for ``val``, at the temperature that was fitted in validation or came with the checkpoint. Only the first
    validation loader is fitted on.

    Args:
        when: ``"validation"``, or ``"after_fit"``: once at the end of training, for the last weights and for every
            checkpoint kept on disk (those files are rewritten with their own temperature in them; a file that holds
            objects of your own classes is left as it is, with a warning).
            List it behind callbacks that exchange the weights when training ends (weight averaging).
        dataloader: The loader that ``"after_fit"`` fits on; by default the first one of validation.
        checkpoints: Which files ``"after_fit"`` rewrites; by default all that the Trainer's checkpoint callbacks keep.
        apply: Divide the module's logits in ``Trainer.test`` and ``predict``. Other callbacks of this package still see
            the logits as they are.
        max_samples: Predictions kept for the fit, a seeded random sample of all.
        bins: Of the ECE.
        seed: Of that sample and of the halves.
        target_key: Where the target is, if no loss tells.
        logits_fn: ``(module, batch) -> logits`` where no loss can be read; needs ``target_key``.
        loss_index: Which loss call of the step is read, 0 for the first.
        name: Tells two callbacks of this class apart: keys start with ``calibration.{name}``.

    Raises:
        ValueError: If a setting is out of range or belongs to another ``when``.

    Example:
        >>> TemperatureScaling().key("val", "temperature")
        'calibration/val/temperature'

    References:
        Guo et al., 2017, https://arxiv.org/abs/1706.04599, section 4.2.
    """

    def __init__(
        self,
        *,
        when: str = "validation",
        dataloader: Any = None,
        checkpoints: Sequence[str] | None = None,
        apply: bool = False,
        max_samples: int = 50_000,
        bins: int = 15,
        seed: int = 0,
        target_key: str | int | tuple[str | int, ...] | None = None,
        logits_fn: Callable[..., Any] | None = None,
        loss_index: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__("calibration", name, Probe(None, target_key, logits_fn, loss_index), ("val", "test"))
        if when not in ("validation", "after_fit"):
            raise ValueError(f"when= must be 'validation' or 'after_fit', got {when!r}.")
        if when == "validation" and (dataloader is not None or checkpoints is not None):
            raise ValueError("dataloader= and checkpoints= belong to when='after_fit'; validation uses its own loader.")
        if isinstance(dataloader, Dataset):
            raise ValueError("dataloader= takes a loader, got a data set: DataLoader(data_set, batch_size=...).")
        if max_samples < 2 or bins < 1:
            raise ValueError(f"max_samples= must be at least 2 and bins= at least 1, got {max_samples} and {bins}.")
        self.when, self.dataloader, self.checkpoints, self.apply = when, dataloader, checkpoints, apply
        self.max_samples, self.bins, self.seed = max_samples, bins, seed
        self._entry: dict[str, Any] = {}
        self._routes: list[Route] = []  # to the logits that the temperature is about
        self._saved: dict[str, None] = {}  # files that checkpoint callbacks wrote in this fit, in order
        self._reservoir = Reservoir(max_samples, seed)
        self._scaled: dict[int, Reliability] = {}

    @property
    def temperature(self) -> float | None:
        """The present temperature; None before the first fit."""
        return self._entry.get("temperature")

    def section(self) -> Mapping[str, Any]:
        return {self.area: self._entry} if self._entry else {}

    def settings(self) -> Mapping[str, Any]:
        return {"when": self.when, "apply": self.apply, "max_samples": self.max_samples, "seed": self.seed}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._entry = {}  # other weights come
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def recall(self, trainer: Any) -> None:
        if trainer.ckpt_path and not self._recalled:
            self._entry = {}
        super().recall(trainer)

    def restore(self, entry: Mapping[str, Any]) -> None:
        section = entry.get(self.area, {})
        if "temperature" in section:
            stored_temperature(entry, name=self.name)  # says if it belongs to other weights
            own = ("temperature", "at_bound", "fit_step", "samples", "nll", "nll_scaled")
            self._entry = {key: section[key] for key in own}
            self._routes = routes_in(entry)

    # -- when ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._entry = {}  # of another run; a resumed one reads its own from the checkpoint
            self._saved = {}

    def attach(self, trainer: Any, pl_module: Any) -> None:
        if self.when == "after_fit" and self.dataloader is None and not trainer.enable_validation:
            raise ValueError("TemperatureScaling(when='after_fit') needs dataloader= where there is no validation.")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._saved.update(_written(trainer))  # before the next save hides the last one

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._apply(trainer, pl_module)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self._detach()

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self._apply(trainer, pl_module)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        self._detach()

    def begin(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._reservoir, self._scaled = Reservoir(self.max_samples, self.seed), {}
        if stage == "test" and self.temperature is None:
            warnings.warn(
                "TemperatureScaling has no temperature for these weights: fit with it, test with ckpt_path= of a "
                "checkpoint that stores one, or run Trainer.validate first.",
                stacklevel=2,
            )

    def hear(self, trainer: Any, pl_module: Any, heard: Heard, loader: int, stage: str) -> None:
        if stage == "test":
            if self.temperature is not None:
                self._add_scaled(loader, *heard.rows()[:2], self.temperature)
        elif loader == 0 and not (trainer.state.fn == "fit" and self.when == "after_fit"):
            self._reservoir.add(*heard.rows())

    def finish(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "test":
            self._report(trainer, pl_module)
        elif not (trainer.state.fn == "fit" and self.when == "after_fit"):
            rows = self._kept(trainer, pl_module)
            fit = self._fit(trainer, pl_module, rows)
            if fit is not None:
                self._cross_fitted(trainer, pl_module, rows, fit)
        self._reservoir, self._scaled = Reservoir(self.max_samples, self.seed), {}

    @torch.inference_mode(False)
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.when == "after_fit":
            self._after_fit(trainer, pl_module)

    # -- fitting -------------------------------------------------------------------------------------------------

    def _kept(self, trainer: Any, pl_module: Any) -> tuple[Tensor, ...]:
        """Log-probabilities, labels and sample numbers of what was kept and has a finite loss."""
        rows = (
            self._reservoir.rows()
            if trainer.world_size == 1
            else self._reservoir.rows(self._reduce(trainer, pl_module), trainer.global_rank, trainer.world_size)
        )
        log_p, labels, _ = rows
        finite = log_p.gather(1, labels.long().clamp(0, log_p.shape[1] - 1)[:, None])[:, 0].isfinite()
        lost, left = self._summed(trainer, pl_module, int((~finite).sum()), int(finite.sum()))
        if lost:
            no = "" if left else "; there is no finite one, and no temperature is fitted"
            what = f"{lost} predictions that a temperature was to be fitted on are NaN or infinite{no}."
            warnings.warn(what, stacklevel=2)
        return tuple(column[finite] for column in rows)

    def _reduce(self, trainer: Any, pl_module: Any) -> Callable[[Tensor], Tensor] | None:
        return None if trainer.world_size == 1 else lambda state: self.summed(trainer, pl_module, state)

    def _summed(self, trainer: Any, pl_module: Any, *counts: int) -> list[int]:
        return [int(n) for n in self.summed(trainer, pl_module, torch.tensor(counts, dtype=torch.float64))]

    def _fit(self, trainer: Any, pl_module: Any, rows: tuple[Tensor, ...]) -> TemperatureFit | None:
        log_p, labels, _ = rows
        if not self._summed(trainer, pl_module, len(labels))[0]:
            return None
        fit = fit_temperature(log_p, labels, reduce=self._reduce(trainer, pl_module))
        self._routes = list(self.probe.routes.values())
        self._entry = {
            "temperature": fit.temperature,
            "at_bound": fit.at_bound,
            "fit_step": int(trainer.global_step),
            "samples": fit.samples,
            "nll": fit.nll,
            "nll_scaled": fit.nll_scaled,
        }
        if fit.at_bound:
            self.say(
                trainer,
                f"TemperatureScaling: no best temperature exists for these {fit.samples} predictions (all right, or no "
                f"better than chance); {fit.temperature:g} is a bound, not a finding.",
            )
        return fit

    def _cross_fitted(self, trainer: Any, pl_module: Any, rows: tuple[Tensor, ...], fit: TemperatureFit) -> None:
        log_p, labels, sample = rows
        first = priorities(sample, self.seed + 1) < 0.5
        values = {self.key("val", "temperature"): fit.temperature}
        if min(self._summed(trainer, pl_module, int(first.sum()), int((~first).sum()))):
            for half in (first, ~first):
                other = fit_temperature(log_p[~half], labels[~half], reduce=self._reduce(trainer, pl_module))
                self._add_scaled(0, log_p[half], labels[half], other.temperature)
            own = self._scaled.get(0, Reliability.zero(self.bins))
            sums = Reliability.load(self.summed(trainer, pl_module, own.state()))
            values.update(self._named(sums, "val"))
        self.log_values(pl_module, values, fit.samples)

    def _add_scaled(self, loader: int, log_p: Tensor, labels: Tensor, temperature: float) -> None:
        batch = Reliability.of((log_p.float() / temperature).log_softmax(1), labels, self.bins)
        self._scaled[loader] = self._scaled[loader] + batch if loader in self._scaled else batch

    def _named(self, sums: Reliability, stage: str) -> dict[str, float]:
        measures = sums.measures()
        scaled = {name.replace("ece", "ece_scaled"): v for name, v in measures.items() if name.startswith("ece")}
        scaled |= {"nll_scaled": measures["nll"], "brier_scaled": measures["brier"]}
        return {self.key(stage, name): value for name, value in scaled.items()}

    def _report(self, trainer: Any, pl_module: Any) -> None:
        if self.temperature is None:
            return
        for loader, suffix in enumerate(suffixes(trainer)):
            own = self._scaled.get(loader, Reliability.zero(self.bins))
            sums = Reliability.load(self.summed(trainer, pl_module, own.state()))
            if sums.n:
                values = {**self._named(sums, "test"), self.key("test", "temperature"): self.temperature}
                self.log_values(pl_module, {key + suffix: value for key, value in values.items()}, sums.n)

    # -- after the fit -------------------------------------------------------------------------------------------

    def _after_fit(self, trainer: Any, pl_module: Any) -> None:
        loader = self._own_loader(trainer)
        self._saved.update(_written(trainer))
        files = [Path(path) for path in (self._saved if self.checkpoints is None else self.checkpoints)]
        rewritten = 0
        last = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
        try:
            for file in files:
                if self.checkpoints is None and not file.is_file():
                    continue  # not kept
                try:
                    pl_module.load_state_dict(last)
                    saved = torch.load(file, map_location="cpu", weights_only=True)
                    pl_module.load_state_dict(saved["state_dict"], strict=getattr(pl_module, "strict_loading", True))
                except (pickle.UnpicklingError, RuntimeError, KeyError) as error:
                    why = f"{type(error).__name__}: {error}".splitlines()[0]
                    what = f"{file} could not be given a temperature and is left as it is ({why})."
                    warnings.warn(what, stacklevel=2)
                    continue
                if self._fit_on(trainer, pl_module, loader) is not None and trainer.is_global_zero:
                    fitted = {**self._entry, "fit_step": int(saved["global_step"])}
                    routes = {step: route.to_dict() for step, route in self.probe.routes.items()}
                    rewrite(file, {"route": routes, self.area: fitted}, __version__)
                    rewritten += 1
                trainer.strategy.barrier()
        finally:
            pl_module.load_state_dict(last)
        fit = self._fit_on(trainer, pl_module, loader)
        if fit is not None:
            written = f"; {rewritten} checkpoints got theirs, each for its own weights" if rewritten else ""
            self.say(trainer, f"TemperatureScaling: T = {fit.temperature:.4g} for the last weights{written}.")

    def _own_loader(self, trainer: Any) -> Any:
        if self.dataloader is not None:
            return self.dataloader
        if trainer.val_dataloaders is None:  # this run was too short to validate
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        return evaluation_loaders(trainer)[0][1]

    def _fit_on(self, trainer: Any, pl_module: Any, loader: Any) -> TemperatureFit | None:
        self._reservoir = Reservoir(self.max_samples, self.seed)
        length = true_length(loader, trainer.world_size)
        several = trainer.val_dataloaders is not None and len(evaluation_loaders(trainer)) > 1
        with _validating(trainer):
            for i, (batch, index) in enumerate(own_batches(trainer, loader)):
                batch = transferred(trainer, pl_module, batch)
                args = (batch, i, 0) if several else (batch, i)
                step = self.probe.for_listening(pl_module, ("validation_step", "test_step"), *args)
                with trainer.precision_plugin.val_step_context(), self.probe.reading(step, listening=True) as reading:
                    with torch.no_grad():
                        call = reading.read(reading.x).detached()
                    self._reservoir.add(*Heard(call, reading.x, index, index < length).rows())
        return self._fit(trainer, pl_module, self._kept(trainer, pl_module))

    # -- using it ------------------------------------------------------------------------------------------------

    def _apply(self, trainer: Any, pl_module: Any) -> None:
        if not self.apply:
            return
        self.recall(trainer)
        route = preferred(self._routes)
        if self.temperature is None or route is None:
            raise ProbeError(
                "TemperatureScaling(apply=True) has no temperature, or knows no submodule whose output is the logits. "
                "Fit or validate first, or pass ckpt_path= of a checkpoint that stores both; where no submodule's "
                "output is the logits, use load_temperature(path) and divide them yourself."
            )
        self.on_detach(scale_output(pl_module, route, lambda: self.temperature))


def _written(trainer: Any) -> dict[str, None]:
    """The files that checkpoint callbacks know of; of those that keep all, only the newest."""
    paths: dict[str, None] = {}
    for callback in trainer.checkpoint_callbacks:
        ends = (getattr(callback, "best_model_path", ""), getattr(callback, "last_model_path", ""))
        paths.update(dict.fromkeys(str(path) for path in (*getattr(callback, "best_k_models", {}), *ends) if path))
    return paths


@contextmanager
def _validating(trainer: Any) -> Iterator[None]:
    """Hooks of the user's that augment in training see a validation."""
    stage = trainer.state.stage
    trainer.validating = True
    try:
        yield
    finally:
        trainer.state.stage = stage
