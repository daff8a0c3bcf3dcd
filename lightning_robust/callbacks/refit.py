"""The temperature of another copy of the weights, quantised, pruned or averaged: one call, with before and after."""

from __future__ import annotations

import importlib
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_robust._version import __version__
from lightning_robust.attach.batches import Key
from lightning_robust.attach.checkpoint import rewrite
from lightning_robust.attach.everyone import Everyone
from lightning_robust.attach.listener import Heard
from lightning_robust.attach.monitor import Monitor
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.scaling import load_temperature
from lightning_robust.calibration import Reliability, Temperature
from lightning_robust.callbacks.recalibration import TEMPERATURE, Recalibration, Rows
from lightning_robust.metrics import Reservoir
from lightning_robust.randomness import untouched_random_state

__all__ = ["Refit", "refit_temperature"]

MEASURED = ("calibration", "ood", "shift", "robust", "saliency")
"""Sections of an entry that are about the weights as they were when it was written."""


@dataclass(frozen=True)
class Refit:
    """What a refit found.

    Attributes:
        temperature: Of these weights.
        stored: The temperature that was stored before, 1 if there was none.
        at_bound: Whether the new one is no finding: a bound, or 1 where there was no error to fit it on.
        samples: How many predictions.
        before: ``accuracy``, ``nll``, ``brier``, ``ece`` and ``ece_floor`` of all samples at the stored temperature.
        after: The same of the same samples, cross-fitted: each half at the temperature of the other, so that no number
            is of a temperature that has seen it. At ``temperature`` itself, which has seen all, ``nll`` is lower.
    """

    temperature: float
    stored: float
    at_bound: bool
    samples: int
    before: dict[str, float]
    after: dict[str, float]


def refit_temperature(
    module: Any,
    loader: Any,
    *,
    stored: str | Path | float | None = None,
    write: str | Path | None = None,
    max_samples: int = 50_000,
    seed: int = 0,
    target_key: Key | None = None,
    logits_fn: Callable[..., Any] | None = None,
    loss_index: int = 0,
) -> Refit:
    """Fit the temperature of a module as it is now, and say what the old one does to it and what the new one does.

    Calibration does not survive what is done to weights after training: quantisation, pruning, averaging. Accuracy is
    the same at either temperature.

    Args:
        module: A LightningModule that holds the weights in question; it runs on the device that it is on.
        loader: Labelled data that were not trained on, made like those of validation; the first of several loaders.
        stored: The temperature so far: a checkpoint that has one, or the number; 1 if None.
        write: A checkpoint file of *these* weights that gets the new temperature, in place. What the file says about
            other measurements (``ood``, ``shift``, ``robust``, ``saliency``, the rest of ``calibration``) is taken out:
            it may be about the weights before.
        max_samples: Predictions kept for the fit, a seeded random sample.
        seed: Of that sample and of the halves.
        target_key: Where the target is, if no loss tells.
        logits_fn: ``(module, batch) -> logits`` where no loss can be read; needs ``target_key``.
        loss_index: Which loss call of the step is read, 0 for the first.

    Raises:
        KeyError: If ``stored`` is a checkpoint without a temperature.
        FileNotFoundError: If there is no file ``write``.
        TypeError: If ``module`` is no LightningModule, or ``loader`` a data set.
        ValueError: If the file ``write`` is no checkpoint or holds other weights than the module; or if the loader has
            fewer than two labelled samples with finite logits.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_robust.demo import Classifier
        >>> data = TensorDataset(torch.rand(64, 1, 28, 28), torch.arange(64) % 10)
        >>> found = refit_temperature(Classifier(), DataLoader(data, 32), stored=1.5)
        >>> found.samples, found.stored, found.before["accuracy"] == found.after["accuracy"]
        (64, 1.5, True)
    """
    _check(module, loader)
    if write is not None:
        _check_weights(module, Path(write))
    old = 1.0 if stored is None else float(stored) if isinstance(stored, (int, float)) else load_temperature(stored)
    kept = _Kept(Probe(None, target_key, logits_fn, loss_index), Reservoir(max_samples, seed))
    with untouched_random_state(), _as_it_was(module), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*available but not used.*")
        warnings.filterwarnings("ignore", ".*autograd kernel was not registered.*")  # of quantised layers
        trainer = _trainer(module, kept)
        trainer.validate(module, loader, verbose=False)
    every = Rows(*kept.reservoir.rows())
    rows = every.finite()
    if len(rows) < len(every):
        lost = len(every) - len(rows)
        warnings.warn(f"{lost} of {len(every)} predictions are NaN or infinite; left out.", stacklevel=2)
    if len(rows) < 2:
        raise ValueError(
            f"a temperature is fitted on at least two labelled samples with finite logits, got {len(rows)}."
        )
    recalibration = Recalibration((), None, seed, Everyone(trainer, lambda state: state))
    fit = recalibration.fit(rows)
    crossed = recalibration.crossed(rows)
    after = recalibration.recalibrated(rows) if crossed is None else crossed
    found = Refit(
        fit.temperature,
        old,
        fit.at_bound,
        fit.samples,
        _measured(Reliability.of(Temperature(old)(rows.log_p), rows.labels)),
        _measured(Reliability.of(after[TEMPERATURE], rows.labels)),
    )
    if write is not None:
        _write(Path(write), kept, found, fit.nll)
    return found


class _Kept(Monitor):
    """Keeps what one validation says."""

    def __init__(self, probe: Probe, reservoir: Reservoir) -> None:
        super().__init__("calibration", None, probe, ("val",), strict=True)
        self.reservoir = reservoir

    def hear(self, trainer: Any, pl_module: Any, heard: Heard, loader: int, stage: str) -> None:
        if loader == 0:
            self.reservoir.add(*heard.rows)


def _check(module: Any, loader: Any) -> None:
    plain = getattr(module, "_orig_mod", module)  # of torch.compile
    if not any(kind.__name__ == "LightningModule" for kind in type(plain).__mro__):
        raise TypeError(
            f"expected a LightningModule, whose validation_step says what its logits are, got {type(module).__name__}; "
            "of a plain module hand the logits to lightning_robust.calibration.fit_temperature(logits, targets)."
        )
    if isinstance(loader, Dataset):
        raise TypeError(
            f"expected a loader, got a data set ({type(loader).__name__}): DataLoader(data_set, batch_size=...)."
        )


def _check_weights(module: Any, path: Path) -> None:
    """Whether a file holds the very weights of a module, as far as they can be compared."""
    if not path.is_file():
        raise FileNotFoundError(
            f"write={str(path)!r}: there is no such file; save a checkpoint of these weights first."
        )
    saved = _loaded(path)
    if not isinstance(saved, Mapping) or "state_dict" not in saved:
        raise ValueError(
            f"write={str(path)!r} is no checkpoint: it has no 'state_dict'. Save {{'state_dict': module.state_dict()}}."
        )
    theirs, ours = saved["state_dict"], module.state_dict()
    names = list(ours) if getattr(module, "strict_loading", True) else [name for name in ours if name in theirs]
    other = next((name for name in names if name not in theirs or _differ(ours[name], theirs[name])), None)
    other = next((name for name in theirs if name not in ours), None) if other is None else other
    if other is not None:
        raise ValueError(
            f"write={str(path)!r} holds other weights than the module: {other!r} differs. A temperature belongs to its "
            "weights: save a checkpoint of these, or load those of the file into the module."
        )


def _differ(one: Any, other: Any) -> bool:
    """Whether two values of state dicts are known to be different."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape:
            return True
        if one.is_floating_point() and other.is_floating_point():  # what was saved in half precision is loaded exactly
            return not torch.allclose(one.cpu().double(), other.cpu().double(), rtol=0, atol=0, equal_nan=True)
        return one.dtype != other.dtype or not torch.equal(one.cpu(), other.cpu())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):  # packed weights of a quantised layer
        return len(one) != len(other) or any(_differ(a, b) for a, b in zip(one, other, strict=True))
    return isinstance(one, Tensor) != isinstance(other, Tensor)


def _loaded(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


@contextmanager
def _as_it_was(module: Any) -> Iterator[None]:
    """Give a module its Trainer back, which may be in the middle of a fit, and its device."""
    device = module.device
    trainers = [(part, part._trainer) for part in module.modules() if "_trainer" in vars(part)]
    try:
        yield
    finally:
        for part, trainer in trainers:
            part._trainer = trainer
        if module.device != device:
            module.to(device)  # Lightning leaves it on the CPU


def _measured(sums: Reliability) -> dict[str, float]:
    return {
        "accuracy": sums.accuracy,
        "nll": sums.mean_nll,
        "brier": sums.mean_brier,
        "ece": sums.ece,
        "ece_floor": sums.floor(),
    }


def _write(path: Path, kept: _Kept, found: Refit, nll: float) -> None:
    step = int(_loaded(path).get("global_step", 0))
    section = {
        "temperature": found.temperature,
        "at_bound": found.at_bound,
        "fit_step": step,
        "samples": found.samples,
        "nll": nll,
        "nll_scaled": found.after["nll"],
    }
    routes = {name: route.to_dict() for name, route in kept.probe.routes.items()}
    rewrite(path, {"route": routes, "calibration": section}, __version__, drop=MEASURED)


def _trainer(module: Any, kept: _Kept) -> Any:
    """A Trainer of the Lightning that a module is of, on the module's device: quantised weights cannot leave theirs."""
    ours = any(kind.__module__.startswith("lightning.pytorch.") for kind in type(module).__mro__)
    lightning = importlib.import_module("lightning.pytorch" if ours else "pytorch_lightning")
    device = module.device
    where = {"accelerator": device.type if device.type in ("cpu", "mps") else "auto"}
    return lightning.Trainer(
        callbacks=[kept],
        devices=1 if device.index is None or device.type == "mps" else [device.index],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **where,
    )
