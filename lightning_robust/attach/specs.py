"""Attacks, threat models and penalties as plain dicts, for hyper-parameters: a checkpoint holds no object of ours."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import lightning_robust

__all__ = ["built", "plain"]

PACKAGE = lightning_robust.__name__


def plain(value: Any) -> Any:
    """A setting of this package as ``{"class_path": ..., "init_args": ...}``; anything else as it is.

    Example:
        >>> from lightning_robust import ThreatModel
        >>> plain(ThreatModel("linf", 0.1))["class_path"]
        'lightning_robust.ThreatModel'
    """
    kind = type(value)
    if is_dataclass(kind) and kind.__module__.split(".")[0] == PACKAGE:
        home = PACKAGE if kind.__name__ in lightning_robust.__all__ else kind.__module__
        given = {f.name: plain(getattr(value, f.name)) for f in fields(kind) if f.init}
        return {"class_path": f"{home}.{kind.__name__}", "init_args": given}
    if kind in (list, tuple):
        return kind(plain(item) for item in value)
    return {name: plain(item) for name, item in value.items()} if kind is dict else value


def built(value: Any) -> Any:
    """The inverse of :func:`plain`; only classes of this package are built.

    Raises:
        ValueError: If the class path leads elsewhere.

    Example:
        >>> from lightning_robust import PGD, ThreatModel
        >>> attack = PGD(ThreatModel("l2", 0.5), steps=3)
        >>> built(plain(attack)) == attack
        True
    """
    if isinstance(value, (list, tuple)):
        return type(value)(built(item) for item in value)
    if not (isinstance(value, Mapping) and set(value) == {"class_path", "init_args"}):
        return value
    module, _, name = value["class_path"].rpartition(".")
    if module.split(".")[0] != PACKAGE:
        raise ValueError(
            f"expected a class of {PACKAGE} in the hyper-parameters, got {value['class_path']!r}; build it yourself."
        )
    return getattr(importlib.import_module(module), name)(**{n: built(v) for n, v in value["init_args"].items()})
