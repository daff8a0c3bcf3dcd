"""How far saliency maps have moved, and maps small enough to be kept in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["QuantisedMaps", "drift", "quantised"]

_LEVELS = 127  # of 8 bits with a sign


def drift(maps: Tensor, earlier: Tensor) -> dict[str, Tensor]:
    """How similar maps are to earlier maps of the same inputs and targets: 1 is unmoved.

    ``iou10`` is the number to watch: between a trained and a random net it falls to about .05, what chance gives, where
    other similarities of non-negative maps stop at .5. ``cosine`` is less harsh on small shifts. Neither depends on
    the scale of a map, only on how it spreads over the inputs.

    Args:
        maps: Maps ``(N, ...)`` now.
        earlier: Maps of the same shape.

    Returns:
        One number per sample, ``(N,)`` in float64 on the CPU; NaN where a map itself holds NaN or infinity.

        - ``iou10``: intersection over union, in [0, 1], of the tenth of the inputs (rounded up) with the largest
          magnitude. Ties with the last of them are in, zeros never; two maps of zeros are the same.
        - ``cosine``: of the maps without their means (Pearson's correlation), in [-1, 1]. Two constant maps count 1,
          one constant map counts 0.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> now, before = torch.tensor([[0.0, 0.0, 3.0, 1.0]]), torch.tensor([[0.0, 1.0, 3.0, 0.0]])
        >>> {name: round(float(value), 3) for name, value in drift(now, before).items()}
        {'iou10': 1.0, 'cosine': 0.833}

    References:
        Ghorbani et al., `Interpretation of Neural Networks is Fragile <https://arxiv.org/abs/1710.10547>`_, 2019
        (top-k intersection); Adebayo et al., `Sanity Checks for Saliency Maps <https://arxiv.org/abs/1810.03292>`_,
        2018 (similarity to the maps of a randomised net).
    """
    if maps.shape != earlier.shape or maps.ndim < 2:
        raise ValueError(
            f"expected two tensors of maps (N, ...) of one shape, got {tuple(maps.shape)} and {tuple(earlier.shape)}."
        )
    a, b = (m.detach().cpu().double().flatten(1) for m in (maps, earlier))  # in this order: MPS has no float64
    finite = (a.isfinite() & b.isfinite()).all(1)
    values = {"iou10": _overlap(_largest_tenth(a), _largest_tenth(b)), "cosine": _centred_cosine(a, b)}
    return {name: value.where(finite, torch.nan) for name, value in values.items()}


def _largest_tenth(maps: Tensor) -> Tensor:
    size = maps.abs()
    threshold = size.topk(-(-maps.shape[1] // 10), dim=1).values[:, -1:]
    return (size >= threshold) & (size > 0)


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    both, either = (a & b).sum(1).double(), (a | b).sum(1).double()
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def _centred_cosine(a: Tensor, b: Tensor) -> Tensor:
    flat_a, flat_b = (m.amax(1) == m.amin(1) for m in (a, b))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    # One root of the product, not two roots: the cosine of a map with itself is then 1 to the last bit.
    norms = ((a * a).sum(1) * (b * b).sum(1)).sqrt()
    cosine = ((a * b).sum(1) / norms).clamp(-1, 1)
    return torch.where(flat_a | flat_b, (flat_a & flat_b).double(), cosine)


@dataclass(frozen=True, eq=False)
class QuantisedMaps:
    """Maps in 8 bits, a quarter of their size: what a checkpoint keeps of a snapshot.

    Attributes:
        values: int8 ``(N, ...)``, from -127 to 127.
        scale: float64 ``(N,)``, what one step of each map is worth.
    """

    values: Tensor
    scale: Tensor

    def maps(self) -> Tensor:
        """The maps in float32, each off by at most half a step: 1/254 of its largest magnitude."""
        return (self.values.cpu().double() * _beside(self.scale.cpu(), self.values)).float()

    def to_dict(self) -> dict[str, Any]:
        """Plain tensors, for a checkpoint that ``torch.load(weights_only=True)`` can read."""
        return {"values": self.values, "scale": self.scale}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> QuantisedMaps:
        """What :meth:`to_dict` gave."""
        return cls(state["values"], state["scale"])


def quantised(maps: Tensor) -> QuantisedMaps:
    """Maps ``(N, ...)`` in 8 bits on the CPU, each on its own scale.

    Compare like with like: the drift between two quantised snapshots of the same maps is exactly 1.

    Example:
        >>> snapshot = quantised(torch.tensor([[0.0, -127.0, 40.2]]))
        >>> snapshot.values
        tensor([[   0, -127,   40]], dtype=torch.int8)
        >>> snapshot.maps()
        tensor([[   0., -127.,   40.]])
    """
    exact = maps.detach().cpu().double()
    scale = exact.abs().flatten(1).amax(1) / _LEVELS
    # A map of zeros has no scale, one with NaN has no values: it comes back as NaN, through its scale.
    steps = (exact / _beside(scale.where(scale != 0, 1.0), exact)).nan_to_num(0, 0, 0)
    return QuantisedMaps(steps.round().to(torch.int8), scale)


def _beside(scale: Tensor, maps: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (maps.ndim - 1))
