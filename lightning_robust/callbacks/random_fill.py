"""The control of every penalty on masks: what must not matter is replaced by noise, and nothing else is done."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attach.base import RobustCallback
from lightning_robust.attach.batches import InputKey, Key, as_path, get, one_input, rebuilt, shown
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.seam import install
from lightning_robust.attach.step import Step
from lightning_robust.penalties.features import spread
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import seeded, uniform

__all__ = ["RandomFill"]


class RandomFill(RobustCallback):
    """Feed the training step inputs in which noise stands wherever a mask says that the input must not matter.

    It teaches a model to ignore the region without any gradient of the input: the control beside
    ``SaliencyRegularization(RightReasons(...))``, which has to do better than this, or to do where the region cannot be
    replaced. Training alone is fed; validation sees the data as they are.

    It is no attack, and works beside :class:`~lightning_robust.AdversarialTraining` in any order of callbacks: the
    region is filled first, and what was filled is then attacked. For penalties with ``at="clean"`` too the filled batch
    is the clean one.

    Args:
        mask_key: Where a batch holds the masks, 1 where noise goes and 0 elsewhere (a fraction blends): a key, a
            position, or several on the way down. Shaped like the input, with 1 instead of any size, or without the
            dimension of channels.
        low: Smallest value of the noise, in pixels; by default the lower bound of ``pixels``.
        high: Largest value; by default the upper bound.
        pixels: Bounds and normalisation of the inputs. The default is [0, 1], not normalised. The first batch is held
            to it, unless low or high are given.
        shade: One random shade for the whole mask of a sample, in all channels, instead of noise in each pixel.
        seed: Of the noise, which is a function of (seed, rank, step, batch), ``mask_key`` and ``name``.
        input_key: Where in the batch the input is, if it cannot be told.
        target_key: Where the target is, if the loss cannot be read.
        logits_fn: ``(module, batch) -> logits`` for hand-written losses; needs ``target_key``.
        loss_index: Which loss call of the step tells the input, 0 for the first.
        name: Tells two callbacks of this class with one mask apart.

    Raises:
        ValueError: If low is not below high, ``pixels`` have no bounds and one of the two is missing, or inputs of the
            first batch are not from this pixel space.

    Example:
        >>> RandomFill(mask_key=2, shade=True).range
        (0.0, 1.0)

    References:
        Schramowski et al. (counterexamples), 2020, https://arxiv.org/abs/2001.05371. Random shades: the test part of
        Decoy-MNIST, Ross et al., 2017, https://arxiv.org/abs/1703.03717, section 4.2.
    """

    def __init__(
        self,
        mask_key: Key = 2,
        low: float | None = None,
        high: float | None = None,
        *,
        pixels: PixelSpace = PixelSpace(),  # noqa: B008  # frozen
        shade: bool = False,
        seed: int = 0,
        input_key: InputKey | None = None,
        target_key: Key | None = None,
        logits_fn: Any = None,
        loss_index: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__("fill", name, Probe(one_input(input_key, "RandomFill"), target_key, logits_fn, loss_index))
        bounds = pixels.bounds or (None, None)
        ends = bounds[0] if low is None else low, bounds[1] if high is None else high
        if ends[0] is None or ends[1] is None:
            raise ValueError("RandomFill(pixels=) has no bounds: say low= and high=, between which noise is drawn.")
        if not ends[0] < ends[1]:
            raise ValueError(f"RandomFill(low=, high=) must be increasing, got {ends[0]:g} and {ends[1]:g}.")
        self.range = float(ends[0]), float(ends[1])
        self._own_range = low is not None or high is not None
        self.mask_path, self.pixels, self.shade, self.seed = as_path(mask_key), pixels, shade, seed
        self._trainer: Any = None
        self._batch_idx = 0
        self._said = False

    def clashes(self, other: RobustCallback) -> bool:
        return self.mask_path == getattr(other, "mask_path", None)

    @property
    def state_key(self) -> str:
        return f"{super().state_key}{self.mask_path}"

    def settings(self) -> Mapping[str, Any]:
        return {"mask": shown(self.mask_path), "range": self.range, "shade": self.shade, "seed": self.seed}

    def __str__(self) -> str:
        return f"RandomFill({shown(self.mask_path)})"

    def attach(self, trainer: Any, pl_module: Any) -> None:
        self._trainer, self._said = trainer, False
        # The name orders those who change the data, whatever the order of callbacks is.
        owner = f"{self}{'' if self.name is None else f' {self.name}'}"
        self.on_detach(install(pl_module, owner, feed=self._fed, adversary=False).detach)
        self.on_detach(self._forget)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._batch_idx = batch_idx

    def _forget(self) -> None:
        self._trainer = None

    def _fed(self, step: Step) -> Any:
        inputs = self.probe.route(step).inputs
        x = inputs.of(step.batch)
        mask = get(step.batch, self.mask_path)
        if not isinstance(mask, Tensor):
            raise ValueError(f"{self} expects a tensor at {shown(self.mask_path)}, got {type(mask).__name__}.")
        mask = spread(mask, x)
        if not self._said:
            self._said = True
            if not self._own_range:
                self.pixels.check(x)
            share = float(mask.mean())
            kind = "one shade a sample" if self.shade else "noise in each pixel"
            where = f"{share:.1%} of input {inputs} {tuple(x.shape)}"
            self.say(self._trainer, f"{self}: {kind} from {self.range} in {where}.")
        return rebuilt(step.batch, inputs.into(step.batch, self._filled(x, mask)))

    def _filled(self, x: Tensor, mask: Tensor) -> Tensor:
        low, high = self.range
        # Who draws is part of it: another callback of the same seed would draw the same numbers.
        who = zlib.crc32(f"{self} {self.name}".encode())
        generator = seeded(self.seed, self._trainer.global_rank, self._trainer.global_step, self._batch_idx, who)
        like = torch.empty((len(x), *[1] * (x.ndim - 1)) if self.shade else x.shape, dtype=mask.dtype, device=x.device)
        noise = self.pixels.to_model((low + (high - low) * uniform(like, generator)).expand_as(x))
        # What is not marked keeps its bits: no arithmetic on it.
        return torch.where(mask > 0, x + mask * (noise - x), x).to(x.dtype)
