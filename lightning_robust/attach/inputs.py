"""The input of a network as attacks and penalties see it: one float tensor, wherever in the batch it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attach.batches import Path, get, shown

__all__ = ["Inputs"]


@dataclass(frozen=True)
class Inputs:
    """Where in a batch the input is.

    One float leaf is itself. Integer pixels are seen as a float copy, since the step casts them anyway. Several inputs
    lie side by side, one row of numbers a sample, ``(N, D)``.

    Attributes:
        paths: One path, or several.
        cast: Whether integers are seen as floats.

    Example:
        >>> both = Inputs((("left",), ("right",)))
        >>> batch = {"left": torch.zeros(2, 3), "right": torch.ones(2, 1, 2)}
        >>> both.of(batch).shape
        torch.Size([2, 5])
        >>> both.into(batch, both.of(batch))[("right",)].shape
        torch.Size([2, 1, 2])
    """

    paths: tuple[Path, ...]
    cast: bool = False

    def of(self, batch: Any) -> Tensor:
        """The input of a batch, ``(N, ...)``.

        Raises:
            ValueError: If several inputs do not have one row a sample each.
        """
        found = [self._seen(get(batch, path)) for path in self.paths]
        if len(found) == 1:
            return found[0]
        if len({len(x) for x in found}) > 1:
            sizes = ", ".join(f"{shown(path)} {len(x)}" for path, x in zip(self.paths, found, strict=True))
            raise ValueError(f"several inputs are one sample each row, but their numbers of rows differ: {sizes}.")
        return torch.cat([x.flatten(1) for x in found], 1)

    def shapes(self, batch: Any) -> tuple[torch.Size, ...]:
        """What one sample of each input looks like."""
        return tuple(get(batch, path).shape[1:] for path in self.paths)

    def into(self, batch: Any, x: Tensor) -> dict[Path, Tensor]:
        """What stands at which place of a batch whose input is ``x``; as many samples as ``x`` has."""
        if len(self.paths) == 1:
            return {self.paths[0]: x}
        shapes = self.shapes(batch)
        parts = torch.split(x, [shape.numel() for shape in shapes], 1)
        return {
            path: part.reshape(len(x), *shape).to(self._seen(get(batch, path)).dtype)
            for path, part, shape in zip(self.paths, parts, shapes, strict=True)
        }

    def _seen(self, leaf: Tensor) -> Tensor:
        return leaf.to(torch.get_default_dtype()) if self.cast and not leaf.is_floating_point() else leaf

    def __str__(self) -> str:
        return " and ".join(map(shown, self.paths)) + " (as float)" * self.cast
