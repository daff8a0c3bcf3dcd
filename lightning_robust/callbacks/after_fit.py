"""When the training has ended: the weights of every kept file again, and a loader again, as a validation sees it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_robust._version import __version__
from lightning_robust.attach.checkpoint import rewrite
from lightning_robust.attach.listener import Heard
from lightning_robust.attach.loaders import evaluation_loaders, own_batches, transferred, true_length
from lightning_robust.attach.probe import Probe

__all__ = ["kept_files", "read_loader", "rewrite_files", "validation_loader", "weights_of"]


def kept_files(trainer: Any) -> dict[str, None]:
    """The files that checkpoint callbacks know of; of those that keep all, only the newest."""
    paths: dict[str, None] = {}
    for callback in trainer.checkpoint_callbacks:
        ends = (getattr(callback, "best_model_path", ""), getattr(callback, "last_model_path", ""))
        paths.update(dict.fromkeys(str(path) for path in (*getattr(callback, "best_k_models", {}), *ends) if path))
    return paths


def weights_of(
    module: Any, files: Sequence[str | Path], summed: Callable[..., list[int]], expected: bool = False
) -> Generator[tuple[Path, int], None, None]:
    """Load one file after the other into a module, and in the end the weights that it had.

    A file that one process cannot load is left out by all of them, with a warning: what follows is done together.

    Args:
        module: The LightningModule.
        files: Checkpoints.
        summed: Sums integers over processes.
        expected: Whether a missing file is worth a warning.

    Yields:
        The file, and the step that its weights are from.
    """
    # What a module's get_extra_state gives may be anything.
    state = module.state_dict().items()
    last = {name: v.detach().clone() if isinstance(v, Tensor) else copy.deepcopy(v) for name, v in state}
    try:
        for file in map(Path, files):
            missing, why, step = not expected and not file.is_file(), "", 0
            if not missing:
                try:
                    module.load_state_dict(last)
                    saved = torch.load(file, map_location="cpu", weights_only=True)
                    module.load_state_dict(saved["state_dict"], strict=getattr(module, "strict_loading", True))
                    step = int(saved["global_step"])
                except Exception as error:  # of whatever kind: a process that ended here would leave others waiting
                    why = f"{type(error).__name__}: {error}".splitlines()[0]
            absent, failed, loaded = summed(missing, bool(why), not missing and not why)
            if failed or (absent and loaded):
                why = why or "not every process can read it"
                warnings.warn(f"{file} could not be given a temperature and is left as it is ({why}).", stacklevel=2)
            elif loaded:
                yield file, step
    finally:
        module.load_state_dict(last)


def rewrite_files(
    trainer: Any,
    module: Any,
    files: Sequence[str | Path],
    summed: Callable[..., list[int]],
    fit: Callable[[int], Mapping[str, Any] | None],
    expected: bool = False,
) -> int:
    """Give every file what is fitted for its own weights; how many got it.

    Args:
        trainer: Its processes, of which the first one writes.
        module: The LightningModule.
        files: Checkpoints.
        summed: Sums integers over processes.
        fit: With these weights, which are from that step: the entry, or None where there is nothing to fit on.
        expected: Whether a missing file is worth a warning.
    """
    rewritten = 0
    with closing(weights_of(module, files, summed, expected)) as loaded:
        for file, step in loaded:
            entry = fit(step)
            if entry is not None and trainer.is_global_zero:
                try:
                    rewrite(file, entry, __version__)
                    rewritten += 1
                except OSError as error:
                    warnings.warn(f"{file} could not be rewritten and is left as it is ({error}).", stacklevel=2)
            trainer.strategy.barrier()
    return rewritten


def validation_loader(trainer: Any) -> Any:
    """The first loader of validation."""
    if trainer.val_dataloaders is None:  # this run was too short to validate
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
    return evaluation_loaders(trainer)[0][1]


def read_loader(trainer: Any, module: Any, probe: Probe, loader: Any, add: Callable[..., None]) -> None:
    """Forward a loader and hand every batch's log-probabilities, labels and sample numbers to ``add``."""
    length = true_length(loader, trainer.world_size)
    several = trainer.val_dataloaders is not None and len(evaluation_loaders(trainer)) > 1
    stage = trainer.state.stage
    trainer.validating = True  # hooks of the user's that augment in training see a validation
    try:
        for i, (batch, index) in enumerate(own_batches(trainer, loader)):
            batch = transferred(trainer, module, batch)
            args = (batch, i, 0) if several else (batch, i)
            step = probe.for_listening(module, ("validation_step", "test_step"), *args)
            with trainer.precision_plugin.val_step_context(), probe.reading(step, listening=True) as reading:
                with torch.no_grad():
                    call = reading.read(reading.x).detached()
                add(*Heard(call, reading.x, index, index < length).rows)
    finally:
        trainer.state.stage = stage
