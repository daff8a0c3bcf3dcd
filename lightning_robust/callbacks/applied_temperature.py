"""A temperature that belongs to one set of weights: where it comes from, whether these are they, and its use."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from lightning_robust.attach.monitor import Monitor
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.route import Route
from lightning_robust.attach.scaling import (
    applied_temperature,
    preferred,
    routes_in,
    scale_output,
    stored_temperature,
)
from lightning_robust.attach.watcher import ProbeError

__all__ = ["AppliedTemperature"]

OWN = ("temperature", "at_bound", "fit_step", "samples", "nll", "nll_scaled", "recalibrators", "prediction_sets")


class AppliedTemperature(Monitor):
    """Takes the temperature of checkpoints, and divides the logits by it in ``Trainer.test`` and ``predict``.

    Args:
        name: Tells two callbacks of one class apart.
        probe: How steps are read.
        apply: Whether logits are divided.
        strict: Raise whenever measuring fails.
    """

    def __init__(self, name: str | None, probe: Probe, apply: bool, *, strict: bool = False) -> None:
        super().__init__("calibration", name, probe, ("val", "test"), strict=strict)
        self.apply = apply
        self._weights_step: int | None = None  # that the weights in memory are from, as far as we have seen
        self._routes: list[Route] = []  # to the logits that the temperature is about
        self._fitting = False

    @property
    def temperature(self) -> float | None:
        """The present temperature; None before the first fit."""
        return self._entry.get("temperature")

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
            self._entry = {key: section[key] for key in OWN if key in section}
            self._entry["temperature"] = applied_temperature(section)
            self._routes = routes_in(entry)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._fitting = stage == "fit"

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

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if trainer.state.fn == "fit":
            self._weights_step = int(trainer.global_step)
        super().on_exception(trainer, pl_module, exception)

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
