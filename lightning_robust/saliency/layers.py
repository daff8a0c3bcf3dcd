"""Which layer Grad-CAM should look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

__all__ = ["last_feature_map"]


@dataclass(frozen=True)
class _Call:
    """One call of a submodule: its name, what it is, and the shape of its output if that is one floating tensor."""

    name: str
    module: nn.Module
    shape: torch.Size | None

    @property
    def size(self) -> tuple[int, ...] | None:
        """Height and width, if there are any worth a map."""
        shape = self.shape
        return tuple(shape[2:]) if shape is not None and len(shape) == 4 and tuple(shape[2:]) != (1, 1) else None

    @property
    def convolves(self) -> bool:
        return isinstance(self.module, _ConvNd) and self.size is not None

    @property
    def attends(self) -> bool:
        """Whether tokens are mixed by attention; libraries write their own modules, so the name counts too.

        Attention *inside* convolutional nets (CBAM, SE) keeps feature maps, and is none in this sense.
        """
        if isinstance(self.module, (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            return True
        return "attention" in type(self.module).__name__.lower() and self.shape is not None and len(self.shape) == 3


def last_feature_map(module: nn.Module, run: Callable[[], object]) -> str | None:
    """The name of the submodule that Grad-CAM should look at: the last and most finished feature map.

    The model runs once, and the submodules report what they return. Of those that ran exactly once and returned one
    tensor ``(N, K, H, W)``, the answer is the last whose ``H x W`` is that of the last convolution: normalisation,
    activation and residual sum after that convolution are in, pooling after it is not. Convolutions with a 1x1 output
    (classifier heads, squeeze-and-excitation) do not count, as their map shows nothing.

    Args:
        module: Any module.
        run: Runs it once on some batch; nothing is expected back. Modes and clean-up are the caller's
            (:func:`~lightning_robust.modes.frozen`).

    Returns:
        A name for ``module.get_submodule``; ``None`` where there is no such layer: no 2-D convolution, or attention
        over tokens after the last of them (a vision transformer, whose convolution only cuts patches).

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
        >>> last_feature_map(net, lambda: net(torch.zeros(1, 1, 8, 8)))
        '1'
    """
    calls = _calls(module, run)
    convolutions = [i for i, call in enumerate(calls) if call.convolves]
    if not convolutions or any(call.attends for call in calls[convolutions[-1] :]):
        return None
    size = calls[convolutions[-1]].size
    times = [call.name for call in calls]
    candidates = [call.name for call in calls if call.size == size and times.count(call.name) == 1]
    return candidates[-1] if candidates else None


def _calls(module: nn.Module, run: Callable[[], object]) -> list[_Call]:
    """What ran, in the order in which it ended: a container comes after its parts."""
    calls: list[_Call] = []

    def watcher(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def watch(part: nn.Module, _: Any, output: Any) -> None:
            floating = isinstance(output, Tensor) and output.is_floating_point()
            calls.append(_Call(name, part, output.shape if floating else None))

        return watch

    hooks = [part.register_forward_hook(watcher(name)) for name, part in module.named_modules() if name]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls
