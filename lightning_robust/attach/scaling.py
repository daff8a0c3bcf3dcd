"""Checkpoints with a temperature, put to use: the same module, its logits divided by T."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_robust.attach.checkpoint import read_entry
from lightning_robust.attach.route import Route, call_at
from lightning_robust.attach.watcher import ProbeError, is_unheard

__all__ = ["calibrated", "load_temperature", "route_of", "scale_output", "stored_temperature"]

Module = TypeVar("Module", bound=nn.Module)


def load_temperature(path: str | Path, *, name: str | None = None, strict: bool = False) -> float:
    """The temperature that was fitted for the weights in a checkpoint.

    Args:
        path: A checkpoint that was saved while :class:`~lightning_robust.TemperatureScaling` was attached.
        name: Of that callback, if it has one.
        strict: Raise where the temperature was fitted at another step than the weights are from.

    Raises:
        KeyError: If the checkpoint has no temperature.
        ValueError: If it is stale and ``strict`` is set; else a warning.
    """
    return stored_temperature(read_entry(path), name=name, strict=strict)


def stored_temperature(entry: Mapping[str, Any], *, name: str | None = None, strict: bool = False) -> float:
    """The temperature in a checkpoint's entry; see :func:`load_temperature`."""
    section = entry.get("calibration" if name is None else f"calibration.{name}", {})
    if "temperature" not in section:
        raise KeyError(
            "this checkpoint has no temperature: it was saved without TemperatureScaling, or before the first "
            "validation. `lightning-robust fit calibrate vars.checkpoint=...` fits one."
        )
    if section["fit_step"] != entry["global_step"]:
        message = (
            f"the temperature was fitted at step {section['fit_step']}, the weights are from step "
            f"{entry['global_step']}: it belongs to other weights. Validate before saving, or fit it again."
        )
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)
    return float(section["temperature"])


def calibrated(
    cls: type[Module],
    path: str | Path,
    *,
    module: str | None = None,
    logits_fn: Callable[..., Tensor] | None = None,
    name: str | None = None,
    strict: bool = False,
    **init: Any,
) -> Module:
    """A module from a checkpoint, its logits divided by the temperature that the checkpoint stores.

    Args:
        cls: The LightningModule's class.
        path: The checkpoint.
        module: Name of the submodule whose output is the logits, where the checkpoint does not know one.
        logits_fn: ``(module, x) -> logits`` where no submodule's output is; then ``forward`` returns these, scaled.
        name: Of the TemperatureScaling callback, if it has one.
        strict: Raise where the temperature is stale.
        **init: Arguments of ``cls`` for ``load_from_checkpoint``.

    Returns:
        The same class in eval mode; everything that uses the logits (``forward``, ``predict_step``) is calibrated.

    Raises:
        KeyError: If the checkpoint has no temperature.
        ProbeError: If it does not say which submodule gives the logits, and neither ``module`` nor ``logits_fn`` does.
    """
    entry = read_entry(path)
    temperature = stored_temperature(entry, name=name, strict=strict)
    loaded: Any = cls.load_from_checkpoint(path, map_location="cpu", **init)  # type: ignore[attr-defined]  # a LightningModule
    loaded.eval()
    if logits_fn is not None:
        vars(loaded)["forward"] = lambda *args, **kwargs: logits_fn(loaded, *args, **kwargs) / temperature
        return loaded  # type: ignore[no-any-return]  # of class `cls`
    route = route_of(entry, module)
    if route is None:
        raise ProbeError(
            f"{path} does not record a submodule of {cls.__name__} whose output is the logits. Name it: "
            "calibrated(..., module='net.head'), or give calibrated(..., logits_fn=lambda module, x: ...)."
        )
    scale_output(loaded, route, lambda: temperature)
    return loaded  # type: ignore[no-any-return]  # of class `cls`


def route_of(entry: Mapping[str, Any], module: str | None = None) -> Route | None:
    """The route of an entry whose logits are a module's output; evaluation before training."""
    routes = [Route.from_dict(plain) for plain in entry.get("route", {}).values()]
    routes.sort(key=lambda route: ("validation_step", "test_step", "training_step").index(route.step))
    if module is not None:
        kind = routes[0].kind if routes else "cross_entropy"
        return Route("validation_step", (), None, kind, module)
    return next((route for route in routes if route.module is not None), None)


def scale_output(module: nn.Module, route: Route, temperature: Callable[[], float | None]) -> Callable[[], None]:
    """Divide the logits of a module by a temperature, wherever they are used; returns what undoes it.

    What this package reads (attacks, scores) stays as it is: hooks that listen come first, and our own reads are left
    alone.
    """

    def scale(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        now = None if is_unheard() else temperature()
        if now is None:
            return None
        call = call_at(route, output, torch.empty(0, device=output.device))
        return call.scaled(now).logits.reshape(output.shape)

    return module.get_submodule(route.module or "").register_forward_hook(scale).remove
