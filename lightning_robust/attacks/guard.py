"""A fence around any attack: what it gets is safe to differentiate, what it returns is what it promised."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attacks.joint import JointThreat
from lightning_robust.attacks.threat import ThreatModel
from lightning_robust.modes import gradients
from lightning_robust.protocols import LogitsFn
from lightning_robust.randomness import Noise, reseed, uniform, untouched_random_state

__all__ = ["AttackError", "Guarded", "guard"]


class AttackError(RuntimeError):
    """An attack returned something outside of what it promised."""


@dataclass(frozen=True)
class Guarded:
    """See :func:`guard`."""

    attack: Any
    threat: ThreatModel | JointThreat | None = None
    reach: float | None = None

    def __call__(self, logits_fn: LogitsFn, x: Tensor, y: Tensor, *, generator: Noise = None) -> Tensor:
        """Run the attack outside inference mode, with its own random numbers, and check the result."""
        if not len(x):
            return x
        with gradients(x, y) as (x, y), untouched_random_state():
            # Copies: an attack that writes into its input would be compared with itself, and change the user's batch.
            if _takes_generator(self.attack if inspect.isroutine(self.attack) else type(self.attack).__call__):
                result = self.attack(logits_fn, x.clone(), y.clone(), generator=generator)
            else:
                # A foreign attack draws from the global stream: give it one that belongs to this batch.
                reseed(0 if generator is None else _seed_from(generator, x))
                result = self.attack(logits_fn, x.clone(), y.clone())
        return self._checked(result, x)

    def _checked(self, returned: Any, x: Tensor) -> Tensor:
        what = getattr(self.attack, "name", None) or type(self.attack).__name__
        if not isinstance(returned, Tensor) or returned.shape != x.shape:
            got = tuple(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
            raise AttackError(f"{what} must return a tensor of shape {tuple(x.shape)}, got {got}.")
        result: Tensor = returned.detach().to(x.dtype)
        if not bool(torch.isfinite(result).all()):
            raise AttackError(
                f"{what} returned {int((~torch.isfinite(result)).sum())} NaN or infinite values; a NaN loss or weight "
                f"is the usual cause."
            )
        if self.threat is None:
            return result
        space = self.threat.pixels
        clean, perturbed = space.to_pixels(x), space.to_pixels(result)
        # Round-off of the input's own type, at the size of the pixels.
        slack = (
            8 * torch.finfo(x.dtype).eps * max(float(perturbed.abs().max()), float(clean.abs().max()), self.threat.eps)
        )
        reach = self.threat.eps if self.reach is None else self.reach
        root = clean[0].numel() ** 0.5 if self.threat.norm == "l2" else 1.0
        farthest = float(self.threat.distance(perturbed, clean).max())
        if float(self.threat.excess(perturbed, clean, reach).max()) > reach * 1e-6 + slack * root:
            raise AttackError(
                f"{what} moved an input by {farthest:.6g} ({self.threat.norm}, pixels), but promised at most "
                f"{reach:.6g}. An attack that may go farther states it in an attribute `reach`."
            )
        low, high = space.box(clean)
        # From the clean value on, where that is outside by round-off and was not to be moved.
        over = float(torch.maximum(clean.clamp(max=low) - perturbed, perturbed - clean.clamp(min=high)).max())
        if over > slack:
            raise AttackError(f"{what} left the pixel bounds {space.bounds} by {over:.3g}.")
        return result


@functools.lru_cache(maxsize=64)
def _takes_generator(function: Any) -> bool:
    return "generator" in inspect.signature(function).parameters


def _seed_from(generator: Noise, like: Tensor) -> int:
    drawn = uniform(like.new_zeros(len(like), dtype=torch.float32).cpu(), generator)
    return int(drawn.double().sum() * 2**40) % 2**62


def guard(attack: Any, threat: ThreatModel | JointThreat | None = None, reach: float | None = None) -> Guarded:
    """Fence an attack, ours or anybody's ``(logits_fn, x, y) -> x_adv``.

    The attack runs outside inference mode, on copies where the originals cannot be differentiated, and on random
    numbers of its own. Its result must have the shape of the input, be finite, and lie in the ball and in the box.

    Args:
        attack: A callable; ``generator=`` is passed on if it takes one.
        threat: What to hold it to; by default its own ``threat`` attribute, if it has one.
        reach: Largest allowed distance in pixel units; by default its own ``reach`` attribute, else eps.

    Raises:
        AttackError: When called, if the result breaks a promise. The message says which, and by how much.

    Example:
        >>> threat = ThreatModel("linf", eps=0.1)
        >>> guard(lambda logits_fn, x, y: x + 0.2, threat)(lambda x: x, torch.zeros(1, 2), torch.zeros(1).long())
        Traceback (most recent call last):
        ...
        lightning_robust.attacks.guard.AttackError: function moved an input by 0.2 (linf, pixels), but promised ...
    """
    if isinstance(attack, Guarded):
        return attack
    if not callable(attack) or isinstance(attack, type):
        got = f"the class {attack.__name__}, not an object" if isinstance(attack, type) else type(attack).__name__
        raise TypeError(f"an attack is a callable (logits_fn, x, y) -> x_adv, got {got}.")
    threat = threat if threat is not None else getattr(attack, "threat", None)
    return Guarded(attack, threat, reach if reach is not None else getattr(attack, "reach", None))
