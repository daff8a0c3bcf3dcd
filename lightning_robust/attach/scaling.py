"""Checkpoints with a temperature, put to use: the same module, its logits divided by T."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_robust.attach.checkpoint import read_entry
from lightning_robust.attach.patch import patch
from lightning_robust.attach.route import Route, call_at
from lightning_robust.attach.watcher import UNSCALED, ProbeError, is_unheard
from lightning_robust.calibration import Recalibrator, load_recalibrator

__all__ = [
    "applied_temperature",
    "calibrated",
    "load_temperature",
    "preferred",
    "route_of",
    "routes_in",
    "scale_output",
    "stored_temperature",
]

Module = TypeVar("Module", bound=nn.Module)


def load_temperature(path: str | Path | Mapping[str, Any], *, name: str | None = None, strict: bool = False) -> float:
    """The temperature that was fitted for the weights in a checkpoint.

    Args:
        path: A checkpoint that was saved while :class:`~lightning_robust.TemperatureScaling` was attached; its path,
            or the loaded dict, for files that ``torch.load(weights_only=True)`` does not open.
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
    if not section.get("at_bound"):
        return float(section["temperature"])
    at = applied_temperature(section)
    what = "1 is no finding, and nothing is scaled" if at == 1 else f"the temperature {at:g} is a bound, not a finding"
    warnings.warn(
        f"{what}: for the {section['samples']} predictions it was fitted on no best one exists (all right, or no "
        "better than chance). Fit it on more.",
        stacklevel=3,
    )
    return at


def applied_temperature(section: Mapping[str, Any]) -> float:
    """What a section's temperature is applied as: 1 for a lower bound, which files of earlier versions hold."""
    temperature = float(section["temperature"])
    return 1.0 if section.get("at_bound") and temperature < 1 else temperature


def calibrated(
    cls: type[Module],
    path: str | Path,
    *,
    module: str | None = None,
    logits_fn: Callable[..., Tensor] | None = None,
    name: str | None = None,
    strict: bool = False,
    method: str = "temperature",
    **init: Any,
) -> Module:
    """A module from a checkpoint, its logits divided by the temperature that the checkpoint stores.

    Args:
        cls: The LightningModule's class.
        path: The checkpoint.
        module: Name of the submodule whose output is the logits, where the checkpoint does not know one.
        logits_fn: ``(module, x) -> logits`` where no submodule's output is; then ``forward`` returns these, scaled.
            Inside of it ``module(x)`` is the forward that the class defines.
        name: Of the TemperatureScaling callback, if it has one.
        strict: Raise where the temperature is stale.
        method: ``"temperature"``, or another recalibrator that the checkpoint stores (``methods=`` of
            TemperatureScaling): then log-probabilities take the place of the logits, log-odds that of yes/no outputs'.
        **init: Arguments of ``cls`` and of its ``load_from_checkpoint``; ``weights_only=False`` opens files that hold
            objects, and trusts whoever wrote them.

    Returns:
        The same class in eval mode; everything that uses the logits (``forward``, ``predict_step``) is calibrated.

    Raises:
        KeyError: If the checkpoint has no temperature, or no such recalibrator.
        ProbeError: If it does not say which submodule gives the logits, and neither ``module`` nor ``logits_fn`` does.
    """
    entry = read_entry(path, weights_only=init.get("weights_only") is not False)
    temperature = stored_temperature(entry, name=name, strict=strict)
    recalibrate = None if method == "temperature" else _stored_recalibrator(entry, name, method)
    loaded: Any = cls.load_from_checkpoint(path, **{"map_location": "cpu", **init})  # type: ignore[attr-defined]  # a LightningModule
    loaded.eval()
    if logits_fn is not None:
        if recalibrate is not None:
            raise ValueError(
                f"logits_fn= says nothing about what its logits are, which method={method!r} needs to know; name the "
                "submodule (module=) or recalibrate its logits yourself: read_entry(path) holds the recalibrator."
            )
        _forward_from(loaded, logits_fn, temperature)
        return loaded  # type: ignore[no-any-return]  # of class `cls`
    route = route_of(entry, module)
    if route is None:
        raise ProbeError(
            f"{path} does not record a submodule of {cls.__name__} whose output is the logits. Name it: "
            "calibrated(..., module='net.head'), or give calibrated(..., logits_fn=lambda module, x: ...)."
        )
    if recalibrate is None:
        scale_output(loaded, route, partial(float, temperature))
    else:
        source = _submodule(loaded, route)
        source.register_forward_hook(partial(_recalibrate, route, recalibrate))
    return loaded  # type: ignore[no-any-return]  # of class `cls`


def routes_in(entry: Mapping[str, Any]) -> list[Route]:
    """The routes that a checkpoint's entry knows."""
    return [Route.from_dict(plain) for plain in entry.get("route", {}).values()]


def route_of(entry: Mapping[str, Any], module: str | None = None) -> Route | None:
    """The route of an entry whose logits are a module's output; that of ``module``, if it is named."""
    routes = routes_in(entry)
    if module is None:
        return preferred(routes)
    for route in _ordered(routes):
        if route.module == module:
            return route
    kind = _ordered(routes)[0].kind if routes else "cross_entropy"
    # Probabilities came out of the module that was recorded; this one is said to give logits.
    kind = "binary_cross_entropy_with_logits" if kind == "binary_cross_entropy" else kind
    return Route("validation_step", (), None, kind, module)


def preferred(routes: Iterable[Route]) -> Route | None:
    """The route whose logits are a module's output, of evaluation rather than training; None if there is none."""
    return next((route for route in _ordered(routes) if route.module is not None), None)


def _ordered(routes: Iterable[Route]) -> list[Route]:
    # Training may go through another net than the one whose logits were fitted (a student beside its teacher).
    return sorted(routes, key=lambda route: ("validation_step", "test_step", "training_step").index(route.step))


def scale_output(module: nn.Module, route: Route, temperature: Callable[[], float | None]) -> Callable[[], None]:
    """Divide the logits of a module by a temperature, wherever they are used; returns what undoes it.

    What this package reads (attacks, scores) stays as it is: who listens finds the logits as they were beside the
    scaled ones, and our own reads are left alone.
    """
    source = _submodule(module, route)
    # Of a function of this file, so that a calibrated module can be pickled.
    return source.register_forward_hook(partial(_scale, route, temperature)).remove


def _submodule(module: nn.Module, route: Route) -> nn.Module:
    try:
        return module.get_submodule(route.module or "")
    except AttributeError as error:
        names = ", ".join(name for name, _ in module.named_modules() if name)
        raise ProbeError(f"{type(module).__name__} has no submodule {route.module!r}; it has {names}.") from error


def _stored_recalibrator(entry: Mapping[str, Any], name: str | None, method: str) -> Recalibrator:
    stored = entry["calibration" if name is None else f"calibration.{name}"].get("recalibrators", {})
    if method not in stored:
        have = ", ".join(["temperature", *stored])
        raise KeyError(
            f"the checkpoint has no recalibrator {method!r}, only {have}; TemperatureScaling(methods=[{method!r}]) "
            "fits and stores one."
        )
    return load_recalibrator(stored[method])


def _recalibrate(route: Route, recalibrate: Recalibrator, _module: nn.Module, _args: Any, output: Any) -> Tensor | None:
    if not isinstance(output, Tensor) or not output.ndim or is_unheard():
        return None
    call = call_at(route, output, torch.empty(0, device=output.device))
    scaled = call.recalibrated(recalibrate).logits.reshape(output.shape)
    setattr(scaled, UNSCALED, output)
    return scaled


def _scale(
    route: Route, temperature: Callable[[], float | None], _module: nn.Module, _args: Any, output: Any
) -> Tensor | None:
    # Strategies that wrap the module send whole steps through its hooks: those return no batch of logits.
    now = temperature() if isinstance(output, Tensor) and output.ndim and not is_unheard() else None
    if now is None:
        return None
    call = call_at(route, output, torch.empty(0, device=output.device))
    scaled = call.scaled(now).logits.reshape(output.shape)
    setattr(scaled, UNSCALED, output)
    return scaled


def _forward_from(module: nn.Module, logits_fn: Callable[..., Tensor], temperature: float) -> None:
    """Give a module a forward that returns the logits of ``logits_fn``, divided by the temperature."""
    inside: ContextVar[bool] = ContextVar("inside", default=False)

    def forward(self: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if inside.get():  # `logits_fn` calls the module, and means the forward that it had
            return original(*args, **kwargs)
        token = inside.set(True)
        try:
            return logits_fn(self, *args, **kwargs) / temperature
        finally:
            inside.reset(token)

    patch(module, "forward", forward)
