"""Whether confidence can be believed: ECE with its interval and floor, NLL and Brier score, in every evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_robust.attach.base import show_image
from lightning_robust.attach.batches import Key
from lightning_robust.attach.listener import Heard
from lightning_robust.attach.monitor import Monitor, suffixes
from lightning_robust.attach.probe import Probe
from lightning_robust.calibration import Reliability, reliability_diagram

__all__ = ["CalibrationMonitor"]


class CalibrationMonitor(Monitor):
    """Measure calibration from the logits of the user's own evaluation step, in 48 numbers of state.

    One forward a run finds out where the logits are; from then on they are heard, not computed again.

    Logs ``calibration/val/ece`` (expected calibration error of the likeliest class, equal-width bins), ``ece_low`` and
    ``ece_high`` (95 % interval), ``ece_floor`` (what a perfectly calibrated model of this size and confidence would
    show; an ECE near it says nothing against the model), ``nll`` and ``brier``, with ``test`` for ``val`` in
    ``Trainer.test``. Of several loaders the first keeps these keys and the others add their name or index. Draws a
    reliability diagram in TensorBoard and leaves the bins in every checkpoint. Several labels or pixels a sample are
    predictions of their own.

    Args:
        bins: Of confidence, equally wide.
        stages: Where to measure: ``"val"`` (every validation, in ``fit`` too), ``"test"``, or both.
        diagram: Whether to draw the reliability diagram.
        target_key: Where the target is, if no loss tells.
        logits_fn: ``(module, batch) -> logits`` where no loss can be read; needs ``target_key``.
        loss_index: Which loss call of the step is read, 0 for the first.
        strict: Raise whenever measuring fails; else a failure in the middle of a run is said once, its metrics are
            logged as NaN, and the run goes on.
        name: Tells two callbacks of this class apart: keys start with ``calibration.{name}``.

    Raises:
        ValueError: If bins is below 1 or a stage is unknown.

    Example:
        >>> CalibrationMonitor(bins=10).key("val", "ece")
        'calibration/val/ece'

    References:
        Guo et al., 2017, https://arxiv.org/abs/1706.04599.
    """

    def __init__(
        self,
        *,
        bins: int = 15,
        stages: Sequence[str] = ("val", "test"),
        diagram: bool = True,
        target_key: Key | None = None,
        logits_fn: Callable[..., Any] | None = None,
        loss_index: int = 0,
        strict: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__("calibration", name, Probe(None, target_key, logits_fn, loss_index), stages, strict=strict)
        if bins < 1:
            raise ValueError(f"bins= must be at least 1, got {bins}.")
        self.bins, self.diagram = bins, diagram
        self._sums: dict[int, Reliability] = {}

    def settings(self) -> Mapping[str, Any]:
        return {"bins": self.bins, "stages": ", ".join(self.stages)}

    def headlines(self) -> Sequence[str]:
        return ["ece", "nll", "brier"]

    def begin(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._sums = {}

    def hear(self, trainer: Any, pl_module: Any, heard: Heard, loader: int, stage: str) -> None:
        log_p, labels, _samples = heard.rows
        batch = Reliability.of(log_p, labels, self.bins)
        self._sums[loader] = self._sums[loader] + batch if loader in self._sums else batch

    def finish(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # Every process goes through all loaders: what is summed must be summed by all of them.
        for loader, suffix in enumerate(suffixes(trainer)):
            own = self._sums.get(loader, Reliability.zero(self.bins))
            sums = Reliability.load(self.summed(trainer, pl_module, own.state()))
            if sums.invalid:
                warnings.warn(
                    f"{sums.invalid} predictions of the {stage} data{suffix} are NaN or infinite; they are left out of "
                    f"{self.key(stage, 'ece')}.",
                    stacklevel=2,
                )
            if not sums.n:
                continue
            measures = sums.measures()
            self.log_values(pl_module, {self.key(stage, k) + suffix: v for k, v in measures.items()}, sums.n)
            if self.diagram and trainer.is_global_zero:
                when = f", epoch {trainer.current_epoch + 1}" if trainer.state.fn == "fit" else ""
                title = f"{stage}{suffix}{when}"
                show_image(trainer, self.key(stage, "reliability") + suffix, reliability_diagram(sums, title))
            if loader == 0 and stage == "val":
                # `nll` beside the temperature is about the predictions that it was fitted on.
                shown = {name: value for name, value in measures.items() if name != "nll"}
                self.record(trainer, {**shown, "n": sums.n, "bins": {**sums.to_dict(), "nll": measures["nll"]}})
        self._sums = {}
