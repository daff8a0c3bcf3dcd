"""Several attacks, one after the other, each on the samples that still hold: the worst case of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attacks.apgd import APGD
from lightning_robust.attacks.fgsm import FGSM
from lightning_robust.attacks.guard import guard
from lightning_robust.attacks.heads import narrowed
from lightning_robust.attacks.n_fgsm import NFGSM
from lightning_robust.attacks.noise import UniformNoise
from lightning_robust.attacks.pgd import PGD
from lightning_robust.attacks.search import noise_of, searching
from lightning_robust.attacks.square import Square
from lightning_robust.attacks.threat import ThreatModel
from lightning_robust.pixels import PixelSpace
from lightning_robust.protocols import LogitsFn
from lightning_robust.randomness import Noise

__all__ = ["WorstCase"]


@dataclass(frozen=True)
class WorstCase:
    """Attacks in order, cheap ones first; each one gets the samples that all before it left right.

    Of every sample the result with the largest margin is kept, so that what is reported is the union of all attacks.

    Args:
        attacks: Two or more, ``(logits_fn, x, y) -> x_adv``; ours, adapted or your own.
        objective: Only its margin counts: what tells whether a sample is fooled. Callbacks fill it in.
        early_exit: ``False`` gives every attack all samples. ``None``: those that hold, unless a callback measures more
            than accuracy.

    Raises:
        ValueError: If there are fewer than two attacks.

    Example:
        >>> from lightning_robust.attacks import FGSM, PGD, ThreatModel
        >>> threat = ThreatModel("linf", eps=0.1)
        >>> WorstCase([FGSM(threat), PGD(threat, steps=20)]).name
        'worst_fgsm_pgd20_linf_0.1'
    """

    attacks: Sequence[PGD | APGD | Square | FGSM | NFGSM | UniformNoise | Callable[..., Any]]
    objective: str | Callable[..., Any] | None = None
    early_exit: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "attacks", tuple(self.attacks))
        if len(self.attacks) < 2:
            raise ValueError(f"WorstCase takes two or more attacks, got {len(self.attacks)}; use the one by itself.")

    @property
    def threat(self) -> Any:
        """The threat model, where all attacks have the same."""
        threats = [getattr(attack, "threat", None) for attack in self.attacks]
        return threats[0] if all(threat == threats[0] for threat in threats) else None

    @property
    def reach(self) -> float | None:
        """The largest distance from the clean input, in pixel units."""
        threat = self.threat
        return None if threat is None else max(getattr(attack, "reach", threat.eps) for attack in self.attacks)

    @property
    def name(self) -> str:
        """Short name for log keys: ``worst_fgsm_pgd20_linf_0.2``."""
        names = [str(getattr(attack, "name", type(attack).__name__.lower())) for attack in self.attacks]
        end = "" if self.threat is None else f"_{self.threat}"
        return "worst_" + "_".join(name.removesuffix(end) for name in names) + end

    def __call__(self, logits_fn: LogitsFn, x: Tensor, y: Tensor, *, generator: Noise = None) -> Tensor:
        """Perturb ``x`` (model inputs, ``(N, ...)``) against targets ``y``; the result has the type of ``x``."""
        threats = (getattr(attack, "threat", None) for attack in (self, *self.attacks))
        threat = next((threat for threat in threats if threat is not None), _anything())
        with searching(threat, logits_fn, x, y, self.objective, generator) as search:
            best, (_, worst) = x.clone(), search.look(search.clean)
            rows = torch.arange(len(x), device=x.device)
            for attack in self.attacks:
                if search.divisible and self.early_exit is not False:
                    rows = (worst <= 0).nonzero().squeeze(1)
                if not len(rows):
                    break
                whole = len(rows) == len(x)
                part = search if whole else search.at(rows)
                given = attack if whole else _narrowed(attack, rows)
                found = guard(given)(part.logits_fn, x[rows], y[rows], generator=noise_of(generator, rows))
                _, score = part.look(threat.pixels.to_pixels(found))
                better = score > worst[rows]
                best[rows[better]], worst[rows[better]] = found[better], score[better]
            return best


def _anything() -> ThreatModel:

    return ThreatModel("linf", 0.0, PixelSpace(bounds=None))


def _narrowed(attack: Any, rows: Tensor) -> Any:
    """An attack whose objective or threat are about a batch, for some samples of it."""
    if not is_dataclass(attack) or isinstance(attack, type):
        return attack
    values = {f.name: getattr(attack, f.name) for f in fields(attack) if f.name in ("objective", "threat")}
    new = {name: narrowed(value, rows) for name, value in values.items()}
    if hasattr(attack, "attacks"):
        new["attacks"] = tuple(_narrowed(part, rows) for part in attack.attacks)
    return replace(attack, **new)
