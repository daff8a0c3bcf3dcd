"""What a module does on the way to the logits: which parts of it run, and what computes outside of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_robust.modes import gradients
from lightning_robust.protocols import LogitsFn

__all__ = ["Anatomy", "anatomy_of"]

# Functions that move numbers about, and change none.
_MOVES = {
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "swapaxes", "movedim"),
    *("expand", "contiguous", "clone", "to", "float", "double", "type", "detach", "requires_grad_", "__get__"),
    *("cpu", "cuda", "view_as", "reshape_as", "expand_as", "chunk", "split", "unbind", "__getitem__", "dropout"),
}


@dataclass
class Anatomy:
    """What ran, seen by one forward pass; only what lies on the way of gradients counts.

    Attributes:
        leaves: Submodules without submodules, in the order in which they first ended, and how often each ran.
        outside: Names of functions that compute outside of them, before the last one ended.
        bearing: Types of modules that ran, have submodules, and have parameters of their own beside.
        classes: Number of outputs a sample.
    """

    leaves: Counter[nn.Module] = field(default_factory=Counter)
    outside: list[str] = field(default_factory=list)
    bearing: set[str] = field(default_factory=set)
    classes: int = 0

    def suspects(self, known: set[nn.Module]) -> str:
        """What is not among the ``known`` modules, in a sentence."""
        unknown = {type(part).__name__ for part in self.leaves if part not in known} | self.bearing
        said = [f"modules {', '.join(sorted(unknown))}"] if unknown else []
        if self.outside:
            said.append(f"functions outside of modules ({', '.join(dict.fromkeys(self.outside))})")
        return f"Without a rule may be: {' and '.join(said)}." if said else "Nothing was seen that has no rule."


class _Outside(TorchFunctionMode):
    """Writes down which leaves run, and which functions compute while none does; both only on the way of gradients."""

    def __init__(self, anatomy: Anatomy) -> None:
        super().__init__()
        self.anatomy, self._depth = anatomy, 0
        self._later: list[str] = []

    def begin(self, *_: Any) -> None:
        self._depth += 1

    def end(self, part: nn.Module, _: Any, output: Any) -> None:
        self._depth -= 1
        if not self._depth and _has_gradient(output):  # not metrics; nor a loss, which ends the reading of a step
            self.anatomy.leaves[part] += 1
            self.anatomy.outside += self._later  # what comes behind the last leaf belongs to the logits
            self._later = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        if not self._depth and name not in _MOVES and _has_gradient(result):
            self._later.append(name)
        return result


def _has_gradient(result: Any) -> bool:
    first = result[0] if isinstance(result, (tuple, list)) and result else result
    return isinstance(first, Tensor) and first.requires_grad


def anatomy_of(module: nn.Module, logits_fn: LogitsFn, x: Tensor) -> Anatomy:
    """What ``logits_fn`` runs of a module, found by one forward pass of one sample.

    Args:
        module: What may run.
        logits_fn: Runs it.
        x: Inputs ``(N, ...)``, at least one.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.GELU())
        >>> found = anatomy_of(net, lambda x: net(x * 2).exp(), torch.zeros(1, 2))
        >>> [type(part).__name__ for part in found.leaves], found.outside, found.classes
        (['Linear', 'GELU'], ['mul'], 3)
    """
    anatomy = Anatomy()
    outside = _Outside(anatomy)
    handles = []
    for part in module.modules():
        if any(part.children()):
            if any(parameter is not None for parameter in part._parameters.values()):
                handles.append(part.register_forward_pre_hook(lambda p, _: anatomy.bearing.add(type(p).__name__)))
        else:
            handles += [part.register_forward_pre_hook(outside.begin), part.register_forward_hook(outside.end)]
    try:
        with gradients(x[:1]) as (one,), outside:
            z = logits_fn(one.requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
    anatomy.classes = z[0].numel()
    return anatomy
