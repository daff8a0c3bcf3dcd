"""Random noise: the baseline that every attack has to beat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attacks.joint import Threat
from lightning_robust.attacks.search import searching
from lightning_robust.protocols import LogitsFn
from lightning_robust.randomness import Noise

__all__ = ["UniformNoise"]


@dataclass(frozen=True)
class UniformNoise:
    """The worst of some uniformly distributed points of the ball, by margin. It uses no gradient.

    A network that falls to this falls to anything; an attack that does no better than this does not work.

    Args:
        threat: The ball and the pixel space.
        draws: How many points are tried.
        objective: Only its margin counts: what tells how far a sample is fooled. Callbacks fill it in.

    Raises:
        ValueError: If draws is below 1.

    Example:
        >>> from lightning_robust import ThreatModel
        >>> attack = UniformNoise(ThreatModel("linf", eps=0.1), draws=4)
        >>> bool((attack(lambda x: x, torch.full((2, 3), 0.5), torch.tensor([0, 2])) - 0.5).abs().max() <= 0.1)
        True
    """

    threat: Threat
    draws: int = 10
    objective: str | Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"UniformNoise(draws=) must be at least 1, got {self.draws}.")

    @property
    def name(self) -> str:
        """Short name for log keys: ``noise10_linf_0.2``."""
        return f"noise{self.draws}_{self.threat}"

    def __call__(self, logits_fn: LogitsFn, x: Tensor, y: Tensor, *, generator: Noise = None) -> Tensor:
        """Perturb ``x`` (model inputs, ``(N, ...)``) against targets ``y``; the result has the type of ``x``."""
        with searching(self.threat, logits_fn, x, y, self.objective, generator) as search:
            best = search.start()
            worst = search.look(best)[1] if self.draws > 1 else best.new_zeros(len(best))
            for _ in range(self.draws - 1):
                other = search.start()
                score = search.look(other)[1]
                better = (score > worst).view(-1, *[1] * (x.ndim - 1))
                best, worst = torch.where(better, other, best), torch.maximum(worst, score)
            return search.threat.pixels.to_model(best, x.dtype)
