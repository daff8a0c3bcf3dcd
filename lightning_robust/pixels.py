"""What a pixel is worth to a model: the bounds of the data and the normalisation in front of the network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

__all__ = ["Box", "ModelUnits", "PixelSpace", "clamped"]

Box = tuple[Tensor, Tensor] | tuple[float, float]
"""Lowest and highest legal value: one pair of numbers, or one of tensors shaped like the pixels."""


class ModelUnits(Protocol):
    """What turns pixels into what a model sees: a :class:`PixelSpace`, or several side by side."""

    def to_model(self, pixels: Tensor, dtype: torch.dtype | None = None) -> Tensor: ...  # as PixelSpace's


# Round-off of a normalise/denormalise round trip stays far below this share of the range; a wrong range does not.
TOLERANCE = 1e-4


def clamped(pixels: Tensor, box: Box) -> Tensor:
    """Pixels moved into their box."""
    return torch.clamp(pixels, *box)


def _channels(name: str, value: float | Sequence[float]) -> tuple[float, ...]:
    single = isinstance(value, (int, float)) or getattr(value, "ndim", 1) == 0
    numbers = (float(value),) if single else tuple(float(v) for v in value)  # type: ignore[arg-type, union-attr]  # just told apart
    if not numbers or not all(math.isfinite(v) for v in numbers):
        raise ValueError(f"PixelSpace({name}=) takes one finite number or one per channel, got {value!r}.")
    return numbers


@dataclass(frozen=True)
class PixelSpace:
    """Bounds, mean and standard deviation of the inputs.

    A radius, a corruption and a picture speak *pixels*; a model sees ``(pixel - mean) / std``. With this object the
    same pixels come out of the same attack wherever the normalisation stands: in the data set (give mean and std
    here) or in the model (leave them out).

    Args:
        bounds: Lowest and highest legal pixel value; ``None`` where there is no box (tabular data).
        mean: What the data pipeline subtracts, one number or one per channel (dimension 1).
        std: What it divides by, likewise.
        outside: What an attack does with inputs outside the bounds. ``"raise"`` stops; ``"widen"`` lets each such value
            keep its own, wider bound (augmentation that overshoots), so that clean inputs are never moved.

    Raises:
        ValueError: If bounds are not increasing, std is not positive, or mean and std disagree in length.

    Example:
        >>> pixels = PixelSpace(bounds=(0, 1), mean=0.5, std=0.25)
        >>> pixels.to_pixels(torch.tensor([[-2.0, 2.0]]))
        tensor([[0., 1.]])
    """

    bounds: tuple[float, float] | None = (0.0, 1.0)
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    outside: Literal["raise", "widen"] = "raise"

    def __post_init__(self) -> None:
        if self.bounds is not None:
            low, high = (float(b) for b in self.bounds)
            if not low < high:
                raise ValueError(
                    f"PixelSpace(bounds=) must be (lowest, highest) with lowest < highest, got {self.bounds}."
                )
            object.__setattr__(self, "bounds", (low, high))
        mean, std = _channels("mean", self.mean), _channels("std", self.std)
        if min(std) <= 0:
            raise ValueError(f"PixelSpace(std=) must be positive, got {self.std}.")
        if 1 < len(mean) != len(std) > 1:
            raise ValueError(
                f"PixelSpace has {len(mean)} means but {len(std)} standard deviations; give one each per channel."
            )
        if self.outside not in ("raise", "widen"):
            raise ValueError(f"PixelSpace(outside=) must be 'raise' or 'widen', got {self.outside!r}.")
        # One number or a plain tuple: settings are logged, hashed and compared.
        object.__setattr__(self, "mean", mean if len(mean) > 1 else mean[0])
        object.__setattr__(self, "std", std if len(std) > 1 else std[0])

    @property
    def normalises(self) -> bool:
        """Whether model inputs differ from pixels at all."""
        return self.mean != 0.0 or self.std != 1.0

    def to_pixels(self, x: Tensor) -> Tensor:
        """Model inputs ``(N, C, ...)`` to pixels of the same shape, in at least float32."""
        x = x if x.dtype == torch.float64 else x.float()
        return x * self._like(self.std, x) + self._like(self.mean, x) if self.normalises else x

    def to_model(self, pixels: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Pixels ``(N, C, ...)`` to what the model sees, in ``dtype`` (default: as they are)."""
        if self.normalises:
            pixels = (pixels - self._like(self.mean, pixels)) / self._like(self.std, pixels)
        return pixels if dtype is None else pixels.to(dtype)

    def box(self, pixels: Tensor) -> Box:
        """Lowest and highest value that each of ``pixels`` may take."""
        if self.bounds is None:
            return -math.inf, math.inf
        low, high = self.bounds
        lowest, highest = (float(end) for end in pixels.aminmax()) if pixels.numel() else (low, high)
        if lowest >= low and highest <= high:
            return low, high
        # Of values outside (by round-off, or where that is allowed) each is its own bound: none is moved into the box.
        return pixels.clamp(max=low), pixels.clamp(min=high)

    def count_outside(self, x: Tensor) -> int:
        """How many samples of the model inputs ``x`` leave the bounds by more than round-off."""
        return int(self.outside_rows(x).sum())

    def outside_rows(self, x: Tensor) -> Tensor:
        """Which samples of the model inputs ``x`` leave the bounds by more than round-off, ``(N,)``."""
        if self.bounds is None:
            return torch.zeros(len(x), dtype=torch.bool, device=x.device)
        # Half precision cannot hold a normalised white pixel any better than this.
        rounding = (
            torch.finfo(x.dtype).eps * float(x.abs().max()) * max(_channels("std", self.std)) if x.numel() else 0.0
        )
        slack = max(TOLERANCE * (self.bounds[1] - self.bounds[0]), rounding)
        pixels = self.to_pixels(x)
        far = (pixels < self.bounds[0] - slack) | (pixels > self.bounds[1] + slack)
        return far.reshape(len(x), -1).any(1)

    def check(self, x: Tensor, *, attacked: bool = True) -> None:
        """Raise if model inputs ``x`` cannot have come from this pixel space.

        Args:
            x: Model inputs.
            attacked: Whether there is a radius to be given in the same units, and a box that may be left out.

        Raises:
            ValueError: With both ranges and the likely cause, if a value is outside the bounds or not finite.
        """
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"expected finite inputs, got {int((~torch.isfinite(x)).sum())} NaN or infinite values.")
        if self.bounds is None or not self.count_outside(x):
            return
        pixels = self.to_pixels(x)
        low, high = self.bounds
        lowest, highest = float(pixels.min()), float(pixels.max())
        cause = self._likely_cause(lowest, highest, attacked)
        raise ValueError(
            f"expected pixels within [{low:g}, {high:g}], got [{lowest:.4g}, {highest:.4g}]"
            f"{' after undoing mean and std' if self.normalises else ''}. {cause}"
        )

    def _likely_cause(self, lowest: float, highest: float, attacked: bool) -> str:
        low, high = self.bounds or (0.0, 1.0)
        if lowest >= low and highest <= 255 and high <= 1:
            eps = " and give eps in the same units" if attacked else ""
            return f"These look like 0..255 images: use PixelSpace(bounds=(0, 255)){eps}."
        if lowest < low and not self.normalises:
            eps = ", so that eps stays in pixels. For data without bounds use PixelSpace(bounds=None)"
            return (
                "These look normalised: say so with PixelSpace(bounds=..., mean=..., std=...), the numbers that the "
                f"data pipeline uses{eps if attacked else ''}."
            )
        off = "PixelSpace(bounds=None) switches the box off"
        moved = "PixelSpace(outside='widen') has values outside moved to the bounds"
        return f"Check bounds, mean and std against the data pipeline; {off if attacked else moved}."

    @staticmethod
    def _like(value: float | tuple[float, ...], x: Tensor) -> Tensor | float:
        if isinstance(value, float):
            return value
        if x.ndim < 2 or x.shape[1] != len(value):
            raise ValueError(
                f"PixelSpace has {len(value)} channels, but inputs of shape {tuple(x.shape)} have "
                f"{x.shape[1] if x.ndim > 1 else 'none'} in dimension 1; give one number or one per channel."
            )
        return torch.tensor(value, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.ndim - 2))
