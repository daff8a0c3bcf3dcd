"""Honest probabilities: a temperature for each set of weights, stored in their checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_robust._version import __version__
from lightning_robust.attach.batches import Key
from lightning_robust.attach.checkpoint import rewrite
from lightning_robust.attach.listener import Heard
from lightning_robust.attach.monitor import Monitor, suffixes
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.route import Route
from lightning_robust.attach.scaling import preferred, routes_in, scale_output, stored_temperature
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.calibration import Reliability, fit_temperature
from lightning_robust.callbacks.after_fit import kept_files, read_loader, validation_loader, weights_of
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
        max_samples: Predictions kept for the fit, a seeded random sample of all; with more than 50 million /
            ``max_samples`` classes fewer of them (50 million / classes), so that 200 MB are enough.
        bins: Of the ECE.
        seed: Of that sample and of the halves.
        target_key: Where the target is, if no loss tells.
        logits_fn: ``(module, batch) -> logits`` where no loss can be read; needs ``target_key``.
        loss_index: Which loss call of the step is read, 0 for the first.
        strict: Raise whenever measuring fails; else a failure in the middle of a run is said once, its metrics are
            logged as NaN, and the run goes on.
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
        target_key: Key | None = None,
        logits_fn: Callable[..., Any] | None = None,
        loss_index: int = 0,
        strict: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(
            "calibration", name, Probe(None, target_key, logits_fn, loss_index), ("val", "test"), strict=strict
        )
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
        self._weights_step: int | None = None  # that the weights in memory are from, as far as we have seen
        self._bound_said = self._fitting = False
        self._routes: list[Route] = []  # to the logits that the temperature is about
        self._saved: dict[str, None] = {}  # files that checkpoint callbacks wrote in this fit, in order
        self._reservoir = Reservoir(max_samples, seed)
        self._scaled: dict[int, Reliability] = {}

    @property
    def temperature(self) -> float | None:
        """The present temperature; None before the first fit."""
        return self._entry.get("temperature")

    def settings(self) -> Mapping[str, Any]:
        return {"when": self.when, "apply": self.apply, "max_samples": self.max_samples, "seed": self.seed}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._entry, self._weights_step = {}, None  # other weights come
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def recall(self, trainer: Any) -> None:
        if trainer.ckpt_path and not self._recalled:
            self._entry, self._weights_step = {}, None
        super().recall(trainer)

    def restore(self, entry: Mapping[str, Any]) -> None:
        section = entry.get(self.area, {})
        if "temperature" in section:
            if not self._fitting:  # a resumed fit fits it anew before anybody uses it
                stored_temperature(entry, name=self.name)  # says if it belongs to other weights
            own = ("temperature", "at_bound", "fit_step", "samples", "nll", "nll_scaled")
            self._entry = {key: section[key] for key in own}
            self._routes = routes_in(entry)

    # -- when ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._bound_said = False
        self._fitting = stage == "fit"
        if self._fitting:
            self._saved = {}

    def attach(self, trainer: Any, pl_module: Any) -> None:
        if trainer.enable_validation or self.dataloader is not None:
            return
        if self.when == "after_fit":
            raise ValueError("TemperatureScaling(when='after_fit') needs dataloader= where there is no validation.")
        warnings.warn(
            "TemperatureScaling fits in validation, and this fit has none: give it validation data, or use "
            "when='after_fit' with dataloader=.",
            stacklevel=2,
        )

    def headlines(self) -> Sequence[str]:
        return ["temperature", "nll_scaled", "ece_scaled"] if self.when == "validation" else []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._saved.update(kept_files(trainer))  # before the next save hides the last one

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._apply(trainer, pl_module)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self._detach()

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self._apply(trainer, pl_module)
        if self.apply:
            self._check_weights()

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
        if stage == "test":
            self._check_weights()

    def hear(self, trainer: Any, pl_module: Any, heard: Heard, loader: int, stage: str) -> None:
        if stage == "test":
            if self.temperature is not None:
                sums = self._scaled.get(loader, Reliability.zero(self.bins))
                self._scaled[loader] = sums + self._at(self.temperature, *heard.rows[:2])
        elif loader == 0 and not (trainer.state.fn == "fit" and self.when == "after_fit"):
            self._reservoir.add(*heard.rows)

    def finish(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "test":
            self._report(trainer, pl_module)
        elif not (trainer.state.fn == "fit" and self.when == "after_fit"):
            values = self._fit(trainer, pl_module)
            if values:
                self.log_values(pl_module, values, self._entry["samples"])
        self._reservoir, self._scaled = Reservoir(self.max_samples, self.seed), {}

    @torch.inference_mode(False)
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._weights_step = int(trainer.global_step)
        if self.when == "after_fit":
            with self._surviving(trainer, "after_fit"):
                self._after_fit(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if trainer.state.fn == "fit":
            self._weights_step = int(trainer.global_step)
        super().on_exception(trainer, pl_module, exception)

    # -- fitting -------------------------------------------------------------------------------------------------

    def _kept(self, trainer: Any, pl_module: Any) -> tuple[Tensor, ...]:
        """Log-probabilities, labels and sample numbers of what was kept and has a finite loss."""
        reduce = self._reduce(trainer, pl_module)
        rows = self._reservoir.rows(reduce, trainer.global_rank, trainer.world_size)
        log_p, labels, _ = rows
        finite = log_p.gather(1, labels.long().clamp(0, log_p.shape[1] - 1)[:, None])[:, 0].isfinite()
        lost, left = self._summed(trainer, pl_module, int((~finite).sum()), int(finite.sum()))
        if lost:
            no = "" if left else "; there is no finite one, and no temperature is fitted"
            what = f"{lost} predictions that a temperature was to be fitted on are NaN or infinite{no}."
            warnings.warn(what, stacklevel=2)
        return rows if bool(finite.all()) else tuple(column[finite] for column in rows)

    def _reduce(self, trainer: Any, pl_module: Any) -> Callable[[Tensor], Tensor] | None:
        return None if trainer.world_size == 1 else lambda state: self.summed(trainer, pl_module, state)

    def _summed(self, trainer: Any, pl_module: Any, *counts: int) -> list[int]:
        return [int(n) for n in self.summed(trainer, pl_module, torch.tensor(counts, dtype=torch.float64))]

    def _fit(self, trainer: Any, pl_module: Any) -> dict[str, float]:
        """Fit what was kept; what is to be logged of it, nothing where there was nothing to fit on."""
        rows = self._kept(trainer, pl_module)
        log_p, labels, _ = rows
        if not self._summed(trainer, pl_module, len(labels))[0]:
            return {}
        fit = fit_temperature(log_p, labels, reduce=self._reduce(trainer, pl_module))
        crossed = self._cross_fitted(trainer, pl_module, rows)
        self._routes = list(self.probe.routes.values())
        self._weights_step = int(trainer.global_step)
        self._entry = {
            "temperature": fit.temperature,
            "at_bound": fit.at_bound,
            "fit_step": self._weights_step,
            "samples": fit.samples,
            "nll": fit.nll,
            "nll_scaled": fit.nll_scaled if crossed is None else float(crossed.measures()["nll"]),
        }
        if fit.at_bound and not self._bound_said:
            self._bound_said = True
            self.say(
                trainer,
                f"TemperatureScaling: no best temperature exists for these {fit.samples} predictions (all right, or no "
                f"better than chance); {fit.temperature:g} is a bound, not a finding.",
            )
        named = {} if crossed is None else self._named(crossed, "val")
        return {self.key("val", "temperature"): fit.temperature, **named}

    def _cross_fitted(self, trainer: Any, pl_module: Any, rows: tuple[Tensor, ...]) -> Reliability | None:
        """Each half at the temperature of the other, over all processes; None where there are no two halves."""
        log_p, labels, sample = rows
        first = priorities(sample, self.seed + 1) < 0.5
        if not min(self._summed(trainer, pl_module, int(first.sum()), int((~first).sum()))):
            return None
        sums = Reliability.zero(self.bins)
        for half in (first, ~first):
            other = fit_temperature(log_p[~half], labels[~half], reduce=self._reduce(trainer, pl_module))
            sums = sums + self._at(other.temperature, log_p[half], labels[half])
        return Reliability.load(self.summed(trainer, pl_module, sums.state()))

    def _at(self, temperature: float, log_p: Tensor, labels: Tensor) -> Reliability:
        return Reliability.of((log_p.float() / temperature).log_softmax(1), labels, self.bins)

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
        loader = validation_loader(trainer) if self.dataloader is None else self.dataloader
        self._saved.update(kept_files(trainer))
        files = [str(path) for path in (self._saved if self.checkpoints is None else self.checkpoints)]
        summed = partial(self._summed, trainer, pl_module)
        rewritten = 0
        with closing(weights_of(pl_module, files, summed, expected=self.checkpoints is not None)) as loaded:
            for file, step in loaded:
                if self._fit_on(trainer, pl_module, loader) and trainer.is_global_zero:
                    routes = {name: route.to_dict() for name, route in self.probe.routes.items()}
                    try:
                        rewrite(file, {"route": routes, self.area: {**self._entry, "fit_step": step}}, __version__)
                        rewritten += 1
                    except OSError as error:
                        warnings.warn(f"{file} could not be rewritten and is left as it is ({error}).", stacklevel=2)
                trainer.strategy.barrier()
        self._entry = {}  # that of the last file
        if self._fit_on(trainer, pl_module, loader):
            written = f"; {rewritten} checkpoints got theirs, each for its own weights" if rewritten else ""
            self.say(trainer, f"TemperatureScaling: T = {self.temperature:.4g} for the last weights{written}.")

    def _fit_on(self, trainer: Any, pl_module: Any, loader: Any) -> bool:
        self._reservoir = Reservoir(self.max_samples, self.seed)
        read_loader(trainer, pl_module, self.probe, loader, self._reservoir.add)
        return bool(self._fit(trainer, pl_module))

    # -- using it ------------------------------------------------------------------------------------------------

    def _check_weights(self) -> None:
        if self.temperature is not None and self._weights_step not in (None, self._entry["fit_step"]):
            warnings.warn(
                f"the temperature was fitted at step {self._entry['fit_step']}, the weights are from step "
                f"{self._weights_step}: it belongs to other weights. Run Trainer.validate first, or pass ckpt_path= of "
                "a checkpoint that stores its own.",
                stacklevel=2,
            )

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
