"""Foreign inputs that are made of the evaluation batch itself: synthetic sets, and the batch under attack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attach.attacked import AttackedBatch
from lightning_robust.attach.features import Caught
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.step import Step
from lightning_robust.callbacks.foreign_sets import Run
from lightning_robust.losses import LossCall
from lightning_robust.ood.synthetic import GRID
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import seeded

__all__ = ["read_attacked", "read_synthetic"]


def read_synthetic(
    probe: Probe,
    step: Step,
    makers: Mapping[str, Callable[..., Tensor]],
    index: Tensor,
    run: Run,
    add: Callable[[str, LossCall, Caught | None], None],
    *,
    seed: int,
    pixels: PixelSpace,
    warn: Callable[[str], None],
) -> None:
    """Hand what the step says of each synthetic set to ``add``; where the input is no picture, that is said.

    Args:
        probe: How steps are read.
        step: The evaluation step with its batch.
        makers: By name of the set; see :data:`~lightning_robust.ood.SYNTHETIC`.
        index: Number of each sample, ``(N,)``.
        run: How a forward is run.
        add: ``(set, call, caught)``.
        seed: Of the sets.
        pixels: The pixel space of the inputs.
        warn: ``(message)``, once.
    """
    with probe.reading(step, listening=True) as reading:
        x = reading.x
        if x.ndim != 4 or min(x.shape[2:]) < GRID or not x.is_floating_point():
            warn(
                f"synthetic sets are made of pictures (N, C, H, W) with sides of at least {GRID}, the input is "
                f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}: name data sets or loaders of foreign "
                "inputs, OODMonitor({'other': loader})."
            )
            return
        for number, (name, make) in enumerate(makers.items()):
            foreign = make(x, [seeded(seed, number, int(i)) for i in index], pixels)
            add(name, *run(step.module, partial(reading.read, foreign)))


def read_attacked(
    probe: Probe,
    step: Step,
    attack: Any,
    index: Tensor,
    run: Run | None,
    add: Callable[[LossCall, Caught | None], None],
    seed: int,
) -> None:
    """Hand what a step says of its batch under attack to ``add``; with gradients, without autocast.

    Args:
        probe: How steps are read.
        step: One that can be read with gradients, with its batch.
        attack: Any attack.
        index: Number of each sample, ``(N,)``.
        run: How one more forward is run that catches features; None where they are not wanted.
        add: ``(call, caught)``.
        seed: Of the attack.

    Raises:
        ProbeError: If the step cannot be read with gradients.
    """
    with probe.reading(step) as reading:
        with torch.no_grad():
            clean = reading.read(reading.x)
        batch = AttackedBatch(reading, clean, index, seed, to_the_end=True)
        perturbed, call = batch.run(attack)
        caught = None
        if run is not None:
            with torch.no_grad():
                call, caught = run(reading.module, partial(reading.read, perturbed))
        add(call.detached(), caught)
