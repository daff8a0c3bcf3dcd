"""Maps of a user's module by several methods, each given what it asks for: a layer, black, the module itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.attach.reading import Reading
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.pixels import PixelSpace
from lightning_robust.protocols import LogitsFn
from lightning_robust.saliency import last_feature_map
from lightning_robust.saliency.explaining import without_channels

__all__ = ["CHUNK", "Explainer", "submodule"]

CHUNK = 64  # samples a forward
OUTSIDE = 0.01  # of the range: more than round-off


class Explainer:
    """Saliency methods on what a reading reads.

    Args:
        methods: Functions ``(logits_fn, x, target, ...) -> maps`` by name; they are given ``layer``, ``module``,
            ``baseline``, ``seed`` and ``chunk_size`` as far as they take such keywords.
        layer: Name of the submodule that class activation maps look at; found by default.
        pixels: Of the inputs, for black, where paths start; None for [0, 1], and for tables without bounds.
        seed: Of methods with noise.
        warn: Called with a sentence where a method has to be left out, and what it is about.
        strict: Let a method fail that is no match for the module only by accident.
    """

    def __init__(
        self,
        methods: Mapping[str, Callable[..., Tensor]],
        layer: str | None,
        pixels: PixelSpace | None,
        seed: int,
        warn: Callable[[str, str], None],
        strict: bool = False,
    ) -> None:
        self.methods, self.layer, self.pixels, self.seed = methods, layer, pixels, seed
        self._warn, self._strict = warn, strict
        self._takes = {name: set(inspect.signature(method).parameters) for name, method in methods.items()}
        self._found: str | None = None

    def space(self, x: Tensor) -> PixelSpace:
        """The pixel space of these inputs: the one that was given, else [0, 1], and for tables without bounds."""
        return self.pixels or (PixelSpace() if x.ndim > 2 else PixelSpace(bounds=None))

    def check_pixels(self, x: Tensor) -> None:
        """Warn where inputs lie outside of the pixel space: pictures, noise and black would be wrong."""
        space = self.space(x)
        if space.bounds is None:
            return
        low, high = space.bounds
        lowest, highest = (float(end) for end in space.to_pixels(x.detach().float()).aminmax())
        if lowest < low - OUTSIDE * (high - low) or highest > high + OUTSIDE * (high - low):
            self._warn(
                f"inputs lie in [{lowest:.3g}, {highest:.3g}], outside of the pixel space [{low:g}, {high:g}]: "
                "pictures, noise floors and black (where paths start) are wrong. Are they normalised, or 0..255? Say "
                "so with pixels=PixelSpace(bounds=..., mean=..., std=...), or bounds=None for data without bounds.",
                "pixels",
            )

    def forget(self) -> None:
        """Another module may come."""
        self._found = None

    def maps(self, method: str, reading: Reading, x: Tensor, target: Tensor) -> Tensor | None:
        """Maps ``(N, ...)`` of some inputs; None, with a warning, where this method does not fit this module."""
        offered: dict[str, Any] = {"module": reading.module, "seed": self.seed, "chunk_size": CHUNK}
        takes = self._takes[method]
        if "baseline" in takes:
            offered["baseline"] = self.black(x)
        if "layer" in takes:
            layer = self._layer(method, reading, x)
            if layer is None:
                return None
            offered["layer"] = layer
        given = {name: value for name, value in offered.items() if name in takes}
        try:
            return _map_of(x, self.methods[method](self.scores(reading), x, target, **given))
        except (ProbeError, torch.cuda.OutOfMemoryError):  # no fault of this method
            raise
        except ValueError as error:  # what a method says of inputs and modules that it does not fit
            self._warn(f"{method} is left out: {error}", method)
        except Exception as error:
            if self._strict:
                raise
            self._warn(f"{method} failed and is left out: {type(error).__name__}: {error}", method)
        return None

    def scores(self, reading: Reading) -> LogitsFn:
        """Inputs to logits; where a step gives its loss the probability of yes, to the logit of that."""

        def scores(x: Tensor) -> Tensor:
            call = reading.read(x)
            return call.logits.float().logit(eps=1e-7) if call.kind == "binary_cross_entropy" else call.logits

        return scores if reading.y.is_floating_point() else reading.logits

    def _layer(self, method: str, reading: Reading, x: Tensor) -> nn.Module | None:
        name = self.layer or self._found
        if name is None and x.ndim > 2:
            with torch.no_grad():
                name = self._found = last_feature_map(reading.module, lambda: reading.read(x))
        if name is None:
            self._warn(
                f"{method} needs a feature map, and this module has no convolution or attention that gives one for "
                f"inputs (N, {', '.join(map(str, x.shape[1:]))}): leave {method!r} out of methods=, or name a "
                "submodule with layer=.",
                method,
            )
            return None
        return submodule(reading.module, name)

    def black(self, x: Tensor) -> Tensor | float:
        """Where paths start, and what inputs are replaced by: the lowest pixel, or 0 where there are no bounds."""
        space = self.space(x)
        if space.bounds is None:
            return 0.0
        return space.to_model(torch.full_like(x[:1], space.bounds[0]))


def _map_of(x: Tensor, maps: Tensor) -> Tensor:
    """Maps ``(N, ...)`` without channels, in float32.

    Raises:
        ValueError: If these are no maps of the inputs.
    """
    expected = x.shape[:1] + x.shape[2:] if x.ndim > 2 else x.shape
    if isinstance(maps, Tensor) and maps.shape == x.shape:
        maps = without_channels(maps)
    if not isinstance(maps, Tensor) or maps.shape != expected:
        got = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(f"expected maps {tuple(expected)} for inputs {tuple(x.shape)}, got {got}.")
    return maps.detach().float()


def submodule(module: nn.Module, name: str) -> nn.Module:
    """The submodule of this name.

    Raises:
        ValueError: If there is none, with the names that there are.
    """
    try:
        found: nn.Module = module.get_submodule(name)
        return found
    except AttributeError as error:
        names = ", ".join(known for known, _ in module.named_modules() if known)
        raise ValueError(f"layer={name!r} is no submodule of {type(module).__name__}; it has {names}.") from error
