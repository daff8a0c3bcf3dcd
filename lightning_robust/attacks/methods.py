"""The methods of adversarial training: which attack each one needs, and what contradicts it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

from lightning_robust.attacks.fgsm import FGSM
from lightning_robust.attacks.joint import JointThreat
from lightning_robust.attacks.n_fgsm import NFGSM
from lightning_robust.attacks.pgd import PGD
from lightning_robust.attacks.threat import ThreatModel

__all__ = ["BETA", "FEEDS", "STEP_COST", "Method", "attack_for", "cost_of", "in_model_units", "method_named", "name_of"]

Method = Literal["madry", "trades", "mart", "n-fgsm", "fgsm-rs", "fgsm"]

FEEDS: tuple[Method, ...] = ("madry", "mart", "n-fgsm", "fgsm-rs", "fgsm")
"""Methods whose step gets the attacked batch; with the others it runs on the clean one."""

BETA: dict[str, float] = {"trades": 6.0, "mart": 5.0}
"""Weight of the divergence, as published."""

STEP_COST = 0.77
"""Forward and input-gradient backward, as a share of a whole training step (docs/adversarial-training.md)."""

_ONE_STEP: dict[str, tuple[type[Any], Callable[[Any], Any]]] = {
    "n-fgsm": (NFGSM, NFGSM),
    "fgsm-rs": (FGSM, partial(FGSM, start="uniform")),
    "fgsm": (FGSM, FGSM),
}


def method_named(name: str) -> Method:
    """The method of this name; an unknown one is a ``ValueError`` with the nearest."""
    for known in get_args(Method):
        if name == known:
            return known  # type: ignore[no-any-return]  # get_args loses the literal
    near = difflib.get_close_matches(name, get_args(Method), 1, cutoff=0.3)
    raise ValueError(
        f"method= must be one of {', '.join(get_args(Method))}; got {name!r}."
        + (f" Did you mean {near[0]!r}?" if near else "")
    )


def attack_for(method: Method, attack: Any) -> Any:
    """The attack that a method trains against.

    Raises:
        ValueError: If an explicit setting contradicts the method.
        TypeError: If ``attack`` is no attack.
    """
    if method in _ONE_STEP:
        kind, usual = _ONE_STEP[method]
        if isinstance(attack, (ThreatModel, JointThreat)):
            return usual(attack)
        if isinstance(attack, kind) and getattr(attack, "start", None) == getattr(usual(attack.threat), "start", None):
            return attack
        raise ValueError(
            f"method={method!r} brings its own attack: give a ThreatModel (or {kind.__name__} with its settings), got "
            f"{name_of(attack)}."
        )
    if isinstance(attack, (ThreatModel, JointThreat)):
        return PGD(attack, steps=10)
    if method == "trades":
        if not isinstance(attack, PGD):
            raise ValueError(
                f"method='trades' crafts with PGD on its own objective: give a PGD or a ThreatModel, got "
                f"{name_of(attack)}."
            )
        if attack.objective is not None or attack.start not in (None, "gaussian"):
            raise ValueError(
                f"method='trades' sets objective (the divergence) and start ('gaussian') of PGD itself, got "
                f"objective={attack.objective}, start={attack.start!r}. Leave both out."
            )
    if not callable(attack) or isinstance(attack, type):
        raise TypeError(
            f"attack= must be a ThreatModel or a callable (logits_fn, x, y) -> x_adv, got {type(attack).__name__}."
        )
    return attack


def forwards_of(attack: Any) -> int | None:
    """How many forward and backward passes an attack runs; None for a foreign one."""
    if isinstance(attack, PGD):
        return attack.steps * attack.restarts
    return 1 if isinstance(attack, (NFGSM, FGSM)) else None


def cost_of(attack: Any, share: float, adds: bool) -> float | None:
    """A training step in multiples of a clean one, estimated; None for a foreign attack.

    Args:
        attack: What is crafted.
        share: Of the samples that are attacked.
        adds: Whether a term is added that needs another forward and backward pass.
    """
    passes = forwards_of(attack)
    return None if passes is None else 1 + STEP_COST * passes * share + (1.2 if adds else 0)


def name_of(attack: Any) -> str:
    """What to call an attack in a message."""
    return str(getattr(attack, "name", None) or getattr(attack, "__name__", None) or type(attack).__name__)


def in_model_units(threat: ThreatModel | JointThreat) -> str:
    """The radius as the model sees it, where that differs from pixels."""
    if isinstance(threat, JointThreat):
        return ", ".join(filter(None, map(in_model_units, threat.threats)))
    std = threat.pixels.std
    if not threat.pixels.normalises or threat.norm != "linf":
        return ""
    sizes = [threat.eps / s for s in (std if isinstance(std, tuple) else (std,))]
    return f"eps {threat.eps:.4g} in pixels is {' / '.join(f'{s:.4g}' for s in sizes)} in the model's units"
