"""Maps of a user's module by several methods, each given what it asks for: a layer, black, the module itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.attach.reading import Reading
from lightning_robust.pixels import PixelSpace
from lightning_robust.saliency import last_feature_map

__all__ = ["CHUNK", "Explainer", "submodule"]

CHUNK = 64  # samples a forward


class Explainer:
    """Saliency methods on what a reading reads.

    Args:
        methods: Functions ``(logits_fn, x, target, ...) -> maps`` by name; they are given ``layer``, ``module``,
            ``baseline``, ``seed`` and ``chunk_size`` as far as they take such keywords.
        layer: Name of the submodule that class activation maps look at; found by default.
        pixels: For black, where paths start.
        seed: Of methods with noise.
        warn: Called with a sentence where a method has to be left out.
    """

    def __init__(
        self,
        methods: Mapping[str, Callable[..., Tensor]],
        layer: str | None,
        pixels: PixelSpace,
        seed: int,
        warn: Callable[[str], None],
    ) -> None:
        self.methods, self.layer, self.pixels, self.seed, self._warn = methods, layer, pixels, seed, warn
        self._takes = {name: set(inspect.signature(method).parameters) for name, method in methods.items()}
        self._found: str | None = None

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
            return self.methods[method](reading.logits, x, target, **given)
        except ValueError as error:
            self._warn(f"{method} is left out: {error}")
            return None

    def _layer(self, method: str, reading: Reading, x: Tensor) -> nn.Module | None:
        name = self.layer or self._found
        if name is None and x.ndim > 2:
            with torch.no_grad():
                name = self._found = last_feature_map(reading.module, lambda: reading.read(x))
        if name is None:
            self._warn(
                f"{method} needs a feature map, and this module has no convolution or attention that gives one for "
                f"inputs {tuple(x.shape)}: leave {method!r} out of methods=, or name a submodule with layer=."
            )
            return None
        return submodule(reading.module, name)

    def black(self, x: Tensor) -> Tensor | float:
        """Where paths start, and what inputs are replaced by: the lowest pixel, or 0 where there are no bounds."""
        if self.pixels.bounds is None:
            return 0.0
        return self.pixels.to_model(torch.full_like(x[:1], self.pixels.bounds[0]))


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
