"""Which layer class activation maps should look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

__all__ = ["last_feature_map"]

_ATTENTION = (F.multi_head_attention_forward, F.scaled_dot_product_attention)


@dataclass(frozen=True)
class _Call:
    """One call of a submodule: its name, what it is, and the shape of its output if that is one floating tensor.

    Attributes:
        first: Shape of the first output where there are several, as attention returns its weights too.
        start: How many other calls had ended when this one began.
    """

    name: str
    module: nn.Module
    shape: torch.Size | None
    first: torch.Size | None = None
    start: int = 0

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
        return self.is_attention and not any(isinstance(part, _ConvNd) for part in self.module.modules())

    @property
    def is_attention(self) -> bool:
        """Whether this is attention by its name, on tokens or on maps with the channels last."""
        named = "attention" in type(self.module).__name__.lower()
        return named and self.first is not None and len(self.first) in (3, 4)


@dataclass
class _Run:
    """What ran, in the order in which it ended: a container comes after its parts.

    Attributes:
        calls: All calls of submodules.
        attended: Where attention was computed in torch: how many calls had ended, and the names of those still open.
    """

    calls: list[_Call] = field(default_factory=list)
    attended: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)


def last_feature_map(module: nn.Module, run: Callable[[], object]) -> str | None:
    """The name of the submodule that class activation maps should look at.

    The model runs once, and the submodules report what they return; only those that ran exactly once count.

    Convolutional nets: the last and most finished feature map, which is the last output ``(N, K, H, W)`` whose
    ``H x W`` is that of the last convolution. Normalisation, activation and residual sum after that convolution are
    in, pooling after it is not. Convolutions with a 1x1 output (classifier heads, squeeze-and-excitation) do not
    count, as their map shows nothing.

    Transformers, known by attention over tokens after the last convolution: the last layer before the last attention
    that returns tokens like the block around that attention, which is the norm in front of it, or the block before.
    Behind it, a head that reads the class token alone gives the other tokens no gradient.

    Args:
        module: Any module.
        run: Runs it once on some batch; nothing is expected back. Modes and clean-up are the caller's
            (:func:`~lightning_robust.modes.frozen`).

    Returns:
        A name for ``module.get_submodule``; ``None`` where there is no such layer: neither a 2-D convolution nor
        attention behind a layer of tokens.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
        >>> last_feature_map(net, lambda: net(torch.zeros(1, 1, 8, 8)))
        '1'
    """
    seen = _observed(module, run)
    calls = seen.calls
    convolutions = [i for i, call in enumerate(calls) if call.convolves]
    last = convolutions[-1] if convolutions else -1
    if any(call.attends for call in calls[last + 1 :]) or any(ended > last for ended, _ in seen.attended):
        return _before_last_attention(seen)
    if not convolutions:
        return None
    size = calls[last].size
    candidates = [call.name for call in calls if call.size == size and _once(call, calls)]
    return candidates[-1] if candidates else None


def _once(call: _Call, calls: list[_Call]) -> bool:
    return [other.name for other in calls].count(call.name) == 1


def _before_last_attention(seen: _Run) -> str | None:
    calls = seen.calls
    # Modules that are attention by name also stand for attention that is written by hand. What they do before they
    # attend are projections; what counts is what goes into them.
    named = {call.name: call.start for call in calls if _is_attention_module(call)}
    cut = max([*named.values(), *(ended for ended, inside in seen.attended if not named.keys() & {*inside})], default=0)
    around = {call.first for call in calls[cut:] if call.start <= cut and call.first is not None}
    candidates = [
        call.name
        for call in calls[:cut]
        if (call.convolves or (call.first in around and not isinstance(call.module, nn.Linear))) and _once(call, calls)
    ]
    return candidates[-1] if candidates else None


def _is_attention_module(call: _Call) -> bool:
    return isinstance(call.module, nn.MultiheadAttention) or (call.is_attention and call.attends)


class _AttentionCalls(TorchFunctionMode):
    """Says when attention is computed in torch."""

    def __init__(self, seen: Callable[[], None]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ATTENTION:
            self._seen()
        return func(*args, **(kwargs or {}))


def _observed(module: nn.Module, run: Callable[[], object]) -> _Run:
    seen, opened = _Run(), list[tuple[str, int]]()
    names = {id(part): name for name, part in module.named_modules() if name}

    def begin(part: nn.Module, _: Any) -> None:
        opened.append((names[id(part)], len(seen.calls)))

    def end(part: nn.Module, _: Any, output: Any) -> None:
        name, start = opened.pop()
        while name != names[id(part)]:  # some part failed, and what is around it went on
            name, start = opened.pop()
        first = output[0] if type(output) in (tuple, list) and output else output
        whole, part_of = (t.shape if isinstance(t, Tensor) and t.is_floating_point() else None for t in (output, first))
        seen.calls.append(_Call(name, part, whole, part_of, start))

    def attended() -> None:
        seen.attended.append((len(seen.calls), tuple(name for name, _ in opened)))

    with _hooked([part for name, part in module.named_modules() if name], begin, end), _AttentionCalls(attended):
        run()
    return seen


@contextmanager
def _hooked(parts: list[nn.Module], begin: Any, end: Any) -> Iterator[None]:
    # Ours come first before and last after: what hooks of others run is inside.
    hooks = [part.register_forward_pre_hook(begin, prepend=True) for part in parts]
    hooks += [part.register_forward_hook(end) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
