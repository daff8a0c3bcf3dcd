"""A threat that is not the same everywhere: a radius for each sample, or a region that alone may be changed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_robust.attacks.threat import ThreatModel, into_ball, per_sample
from lightning_robust.pixels import Box, PixelSpace, clamped
from lightning_robust.randomness import Noise, normal, uniform

__all__ = ["LocalThreat"]


@dataclass(frozen=True, eq=False)
class LocalThreat:
    """A threat model with radii and regions of a batch; made by :meth:`ThreatModel.within`.

    Attributes:
        threat: The threat model that it narrows.
        radii: In pixel units, ``(N,)``, or None for the same everywhere.
        mask: 1 where pixels may change, 0 elsewhere, ``(N, ...)`` or ``(1, ...)``; None for everywhere.
    """

    threat: ThreatModel
    radii: Tensor | None = None
    mask: Tensor | None = None

    @property
    def norm(self) -> str:
        return self.threat.norm

    @property
    def eps(self) -> float:
        """The radius that steps are measured in: a sample with another one takes steps in proportion to its own."""
        return self.threat.eps

    @property
    def pixels(self) -> PixelSpace:
        return self.threat.pixels

    def __str__(self) -> str:
        return f"{self.threat}{'' if self.mask is None else '_masked'}"

    def scaled(self, fraction: float) -> LocalThreat:
        """The same threat with ``fraction`` of all radii."""
        radii = None if self.radii is None else self.radii * fraction
        return replace(self, threat=self.threat.scaled(fraction), radii=radii)

    def widened(self) -> LocalThreat:
        """See :meth:`ThreatModel.widened`."""
        return replace(self, threat=self.threat.widened())

    def at(self, rows: Tensor) -> LocalThreat:
        """The same threat for some samples."""
        mask = self.mask[rows] if self.mask is not None and len(self.mask) > 1 else self.mask
        return replace(self, radii=None if self.radii is None else self.radii[rows], mask=mask)

    def noise(self, clean: Tensor, noise: Noise = None) -> Tensor:
        """A uniformly distributed point of each sample's ball, inside its region."""
        if self.norm == "linf":
            return self._inside((2 * uniform(clean, noise) - 1) * self._radius(clean))
        direction = self.threat.steepest(self._inside(normal(clean, noise)))
        free = self._inside(torch.ones_like(clean)).flatten(1).count_nonzero(1).clamp_min(1)  # dimensions of the ball
        radius = uniform(clean.flatten(1)[:, :1], noise) ** (1 / free.unsqueeze(1))
        return direction * per_sample(radius, clean) * self._radius(clean)

    def jitter(self, clean: Tensor, noise: Noise = None) -> Tensor:
        """See :meth:`ThreatModel.jitter`."""
        return self._inside(self.threat.jitter(clean, noise))

    def random_start(self, clean: Tensor, box: Box, noise: Noise = None) -> Tensor:
        """See :meth:`ThreatModel.random_start`."""
        return self._kept(clamped(clean + self.noise(clean, noise), box), clean)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The steepest step inside each region, as long as the sample's radius is of the largest one."""
        step = self.threat.steepest(self._inside(gradient))
        return step * (self._radius(gradient) / (self.eps or 1.0)) if self.radii is not None else step

    def project(self, perturbed: Tensor, clean: Tensor, box: Box) -> Tensor:
        """See :meth:`ThreatModel.project`."""
        delta = into_ball(self.norm, self._inside(perturbed - clean), self._radius(clean))
        return self._kept(clamped(clean + delta, box), clean)

    def distance(self, perturbed: Tensor, clean: Tensor) -> Tensor:
        """Moves in proportion to each radius, ``(N,)``, in units of :attr:`eps`; infinite outside a region."""
        delta = perturbed - clean
        moved = self.threat.distance(perturbed, clean)
        if self.radii is not None:
            shares = moved * (self.eps / self.radii.to(moved))
            moved = shares.nan_to_num(nan=0.0)  # a sample that must not move, and did not
        outside = (delta - self._inside(delta)).flatten(1).abs().amax(1) > 0
        return moved.masked_fill(outside, torch.inf)

    def excess(self, perturbed: Tensor, clean: Tensor, reach: float) -> Tensor:
        """See :meth:`ThreatModel.excess`; outside a region every move is one."""
        delta = perturbed - clean
        allowed = reach if self.radii is None else self.radii.to(delta) * (reach / self.eps if self.eps else 1.0)
        outside = (delta - self._inside(delta)).flatten(1).abs().amax(1)
        return torch.maximum(self.threat.distance(perturbed, clean) - allowed, outside)

    def _inside(self, values: Tensor) -> Tensor:
        if self.mask is not None and self.mask.ndim != values.ndim:
            raise ValueError(
                f"a mask has a batch dimension and as many dimensions as the inputs {tuple(values.shape)}, got "
                f"{tuple(self.mask.shape)}; use mask.unsqueeze(0) for one mask for all samples."
            )
        return values if self.mask is None else values * (self.mask != 0).to(values)

    def _kept(self, moved: Tensor, clean: Tensor) -> Tensor:
        """Masked pixels to the bit as they are: the box would move one that is just outside of it."""
        return moved if self.mask is None else torch.where(self.mask != 0, moved, clean)

    def _radius(self, like: Tensor) -> Tensor | float:
        return self.threat.eps if self.radii is None else per_sample(self.radii.to(like), like)
