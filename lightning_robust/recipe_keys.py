"""The keys that a recipe may have: those of the signatures of what it builds."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import typing
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["KEYS", "RecipeError", "check", "imported", "namespace_of", "unknown"]

KEYS = ("about", "base", "vars", "seed", "model", "data", "callbacks", "trainer")


class RecipeError(ValueError):
    """A recipe cannot be run; the message names the key and, if there is one, the nearest valid key."""


def unknown(key: str, valid: Sequence[str], why: str) -> RecipeError:
    """The error for a key that is not valid, with the nearest one that is."""
    near = difflib.get_close_matches(key, valid, 1, cutoff=0.5)
    return RecipeError(f"{key}: {why}." + (f" Did you mean {near[0]!r}?" if near else f" Valid: {', '.join(valid)}."))


def check(resolved: Mapping[str, Any]) -> None:
    """Raise for the first key of a resolved recipe that nothing takes.

    Values are not looked at: jsonargparse knows the types.

    Raises:
        RecipeError: With the full key and the nearest valid one.
    """
    for key in resolved:
        if key not in KEYS:
            raise unknown(key, KEYS, "a recipe has no such key")
    if not resolved.get("model"):
        raise RecipeError("model: a recipe needs a model: {class_path: my_package.MyModule, init_args: {...}}.")
    model = _check_component("model", resolved["model"])
    if resolved.get("data") is not None:
        _check_component("data", resolved["data"])
    for name, callback in resolved["callbacks"].items():
        _check_component(f"callbacks.{name}", callback)
    trainer = importlib.import_module(namespace_of(model)).Trainer
    valid = [name for name in inspect.signature(trainer.__init__).parameters if name not in ("self", "callbacks")]
    for key in resolved.get("trainer") or {}:
        if key == "callbacks":
            raise RecipeError(
                "trainer.callbacks: callbacks have a key of their own, so that they can be named: "
                "callbacks: {name: {class_path: ...}}."
            )
        if key not in valid:
            raise unknown(f"trainer.{key}", [f"trainer.{v}" for v in valid], "Trainer has no such argument")


def _check_component(key: str, node: Any) -> Any:
    if not isinstance(node, Mapping) or "class_path" not in node:
        raise RecipeError(f"{key}: expected {{class_path: package.Class, init_args: {{...}}}}, got {node!r}.")
    for name in node:
        if name not in ("class_path", "init_args"):
            valid = [f"{key}.class_path", f"{key}.init_args", f"{key}.init_args.{name}"]
            raise unknown(f"{key}.{name}", valid, "arguments of a class stand under init_args")
    built = imported(str(node["class_path"]), f"{key}.class_path")
    _check_arguments(f"{key}.init_args", built, node.get("init_args") or {})
    return built


def _check_arguments(key: str, built: Any, arguments: Mapping[str, Any]) -> None:
    parameters = inspect.signature(built).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return  # jsonargparse follows **kwargs through the source; we do not
    hints = typing.get_type_hints(built if dataclasses.is_dataclass(built) else built.__init__)
    for name, value in arguments.items():
        if name not in parameters:
            raise unknown(f"{key}.{name}", [f"{key}.{p}" for p in parameters], f"{built.__name__} has no such argument")
        _check_value(f"{key}.{name}", value, hints.get(name))


def _check_value(key: str, value: Any, annotation: Any) -> None:
    if isinstance(value, list):
        for i, child in enumerate(value):
            _check_value(f"{key}[{i}]", child, None)
    elif isinstance(value, Mapping) and "class_path" in value:
        _check_component(key, value)
    elif isinstance(value, Mapping):
        # Settings without a class path belong to the one dataclass that the argument can be (a threat model, say).
        kinds = [kind for kind in (annotation, *typing.get_args(annotation)) if inspect.isclass(kind)]
        settings = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        if len(settings) == 1:
            _check_arguments(key, settings[0], value)
        else:
            for name, child in value.items():
                _check_value(f"{key}.{name}", child, None)


def imported(class_path: str, key: str) -> Any:
    """The class at a dotted path; ``key`` is where the recipe names it.

    Raises:
        RecipeError: If it cannot be imported or its module has no such name.
    """
    module, _, name = class_path.rpartition(".")
    try:
        home = importlib.import_module(module)
    except (ModuleNotFoundError, ValueError) as error:
        raise RecipeError(
            f"{key}: cannot import {module or class_path!r} ({error}). Is its package installed, or its folder on "
            f"PYTHONPATH?"
        ) from error
    if not hasattr(home, name):
        valid = [f"{module}.{n}" for n in dir(home) if not n.startswith("_")]
        raise unknown(class_path, valid, f"{key} names no class")
    return getattr(home, name)


def namespace_of(model: Any) -> str:
    """Which Lightning a module belongs to, ``pytorch_lightning`` or ``lightning.pytorch``; the two do not mix."""
    if importlib.util.find_spec("lightning") is not None:
        from lightning.pytorch import LightningModule

        if inspect.isclass(model) and issubclass(model, LightningModule):
            return "lightning.pytorch"
    return "pytorch_lightning"
