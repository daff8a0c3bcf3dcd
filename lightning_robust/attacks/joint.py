"""Several inputs of one model: each has its own threat model, and one attack moves them together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_robust.attacks.threat import ThreatModel
from lightning_robust.pixels import Box, PixelSpace
from lightning_robust.randomness import Noise

__all__ = ["JointThreat", "Threat", "side_by_side"]


def _split(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    parts = torch.split(flat, [shape.numel() for shape in shapes], 1)
    return [part.reshape(len(flat), *shape) for part, shape in zip(parts, shapes, strict=True)]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten(1) for part in parts], 1)


@dataclass(frozen=True)
class _JointPixels:
    """The pixel spaces of inputs that lie side by side; see :class:`~lightning_robust.PixelSpace`."""

    spaces: tuple[PixelSpace, ...]
    shapes: tuple[torch.Size, ...]

    @property
    def outside(self) -> str:
        return self.spaces[0].outside

    @property
    def normalises(self) -> bool:
        return any(space.normalises for space in self.spaces)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The widest; None where no input has any."""
        own = [space.bounds for space in self.spaces if space.bounds is not None]
        return (min(low for low, _ in own), max(high for _, high in own)) if own else None

    def to_pixels(self, x: Tensor) -> Tensor:
        return _joined([space.to_pixels(part) for space, part in self._parts(x)])

    def to_model(self, pixels: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return _joined([space.to_model(part, dtype) for space, part in self._parts(pixels)])

    def box(self, pixels: Tensor) -> Box:
        lows, highs = [], []
        for space, part in self._parts(pixels):
            low, high = space.box(part)
            lows.append(torch.as_tensor(low, dtype=part.dtype, device=part.device).expand_as(part))
            highs.append(torch.as_tensor(high, dtype=part.dtype, device=part.device).expand_as(part))
        return _joined(lows), _joined(highs)

    def outside_rows(self, x: Tensor) -> Tensor:
        return torch.stack([space.outside_rows(part) for space, part in self._parts(x)]).any(0)

    def count_outside(self, x: Tensor) -> int:
        return int(self.outside_rows(x).sum())

    def check(self, x: Tensor) -> None:
        for space, part in self._parts(x):
            space.check(part)

    def _parts(self, x: Tensor) -> list[tuple[PixelSpace, Tensor]]:
        return list(zip(self.spaces, _split(x, self.shapes), strict=True))


@dataclass(frozen=True)
class JointThreat:
    """A threat model for each of several inputs (``input_key=[...]``), in their order.

    An attack sees the inputs side by side, ``(N, D)``, and moves all of them in each step; every input stays in its own
    ball and its own box. A single :class:`ThreatModel` in an attack on several inputs holds for each of them.

    Args:
        threats: One for each input.
        shapes: Of one sample of each input; callbacks fill it in.

    Raises:
        ValueError: If there are fewer than two threat models.

    Example:
        >>> image, sound = ThreatModel("linf", 0.03), ThreatModel("l2", 0.5, PixelSpace(bounds=None))
        >>> str(JointThreat((image, sound)))
        'linf_0.03+l2_0.5'
    """

    threats: tuple[ThreatModel, ...]
    shapes: tuple[torch.Size, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "threats", tuple(self.threats))
        if len(self.threats) < 2 or not all(isinstance(threat, ThreatModel) for threat in self.threats):
            raise ValueError(
                f"JointThreat takes a threat model for each of two or more inputs, got {self.threats!r}; for one input "
                "give the attack its ThreatModel."
            )

    def __str__(self) -> str:
        return "+".join(map(str, self.threats))

    @property
    def norm(self) -> str:
        """The norm of all; ``"l2"`` where they differ."""
        norms = {threat.norm for threat in self.threats}
        return norms.pop() if len(norms) == 1 else "l2"

    @property
    def eps(self) -> float:
        """The largest radius; steps and distances of the other inputs are in proportion."""
        return max(threat.eps for threat in self.threats)

    @property
    def pixels(self) -> _JointPixels:
        """Bounds and normalisation of each input."""
        return _JointPixels(tuple(threat.pixels for threat in self.threats), self.shapes)

    def scaled(self, fraction: float) -> JointThreat:
        """The same threats with ``fraction`` of their radii."""
        return replace(self, threats=tuple(threat.scaled(fraction) for threat in self.threats))

    def widened(self) -> JointThreat:
        """See :meth:`ThreatModel.widened`."""
        return replace(self, threats=tuple(threat.widened() for threat in self.threats))

    def noise(self, clean: Tensor, noise: Noise = None) -> Tensor:
        """See :meth:`ThreatModel.noise`."""
        return _joined([threat.noise(part, noise) for threat, part in self._parts(clean)])

    def jitter(self, clean: Tensor, noise: Noise = None) -> Tensor:
        """See :meth:`ThreatModel.jitter`."""
        return _joined([threat.jitter(part, noise) for threat, part in self._parts(clean)])

    def random_start(self, clean: Tensor, box: Box, noise: Noise = None) -> Tensor:
        """See :meth:`ThreatModel.random_start`."""
        boxes = self._boxes(box)
        return _joined([t.random_start(x, b, noise) for (t, x), b in zip(self._parts(clean), boxes, strict=True)])

    def steepest(self, gradient: Tensor) -> Tensor:
        """The steepest step of each input, as long as its radius is of the largest one."""
        largest = self.eps or 1.0
        return _joined([threat.steepest(part) * (threat.eps / largest) for threat, part in self._parts(gradient)])

    def project(self, perturbed: Tensor, clean: Tensor, box: Box) -> Tensor:
        """See :meth:`ThreatModel.project`."""
        rows = zip(self._parts(perturbed), self._parts(clean), self._boxes(box), strict=True)
        return _joined([threat.project(moved, x, own) for (threat, moved), (_, x), own in rows])

    def distance(self, perturbed: Tensor, clean: Tensor) -> Tensor:
        """How far each sample was moved, ``(N,)``: of the inputs the one that went farthest for its radius."""
        rows = zip(self._parts(perturbed), self._parts(clean), strict=True)
        shares = [t.distance(moved, x) * (self.eps / t.eps if t.eps else math.inf) for (t, moved), (_, x) in rows]
        return torch.stack(shares).nan_to_num(nan=0.0).amax(0)  # an input that must not move, and did not

    def excess(self, perturbed: Tensor, clean: Tensor, reach: float) -> Tensor:
        """See :meth:`ThreatModel.excess`; each input has its share of ``reach``."""
        rows, largest = zip(self._parts(perturbed), self._parts(clean), strict=True), self.eps or 1.0
        return torch.stack([t.excess(moved, x, reach * (t.eps / largest)) for (t, moved), (_, x) in rows]).amax(0)

    def _boxes(self, box: Box) -> list[Box]:
        low, high = (_split(torch.as_tensor(side), self.shapes) for side in box)
        return list(zip(low, high, strict=True))

    def _parts(self, x: Tensor) -> list[tuple[ThreatModel, Tensor]]:
        return list(zip(self.threats, _split(x, self.shapes), strict=True))


if TYPE_CHECKING:
    Threat = ThreatModel | JointThreat
else:
    # What recipes build and check; jsonargparse before 4.53 cannot tell which of two dataclasses plain settings are of.
    Threat = ThreatModel


def side_by_side(threat: ThreatModel | JointThreat, shapes: Sequence[torch.Size]) -> ThreatModel | JointThreat:
    """The threat model for inputs of these shapes, as an attack sees them.

    Raises:
        ValueError: If there is another number of threat models than inputs.
    """
    if isinstance(threat, JointThreat):
        if len(threat.threats) != len(shapes):
            raise ValueError(
                f"{len(threat.threats)} threat models for {len(shapes)} input{'s' * (len(shapes) != 1)}: give one for "
                "each key of input_key=[...], in the same order, or a single ThreatModel for all."
            )
        return replace(threat, shapes=tuple(shapes))
    return threat if len(shapes) == 1 else JointThreat((threat,) * len(shapes), tuple(shapes))
