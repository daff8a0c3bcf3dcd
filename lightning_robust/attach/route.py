"""How to get from a batch to logits and targets, and how to recognise where they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.attach.batches import Path, get, leaves, shown
from lightning_robust.attach.inputs import Inputs
from lightning_robust.attach.watcher import Followed
from lightning_robust.losses import LossCall

__all__ = ["Route", "call_at", "outputs_into", "producer_of", "target_of"]


@dataclass(frozen=True)
class Route:
    """How to get from a batch to logits and targets; found once per kind of step, stored in checkpoints.

    Attributes:
        step: The step that is run.
        input: Where in the batch the input is.
        target: Where the loss's target is, if it is a leaf of the batch.
        kind: The loss that was called.
        module: Name of the submodule whose output is the logits, if there is one (``""`` is the module itself).
        stop_at_module: Stop at that module's output instead of at a loss (steps that compute none).
        shape: What follows the first dimension of the logits, where the loss gets another view of the module's output.
        cast: Whether the step gives its target another shape or type (``y.float().unsqueeze(1)``).
        ignore_index: The class that the loss leaves out.
        differentiable: Whether a gradient reaches the input; else ``input`` is a leaf to count samples by.
        others: Where further inputs are, if the user named several.
        integer: Whether the input is integers (uint8 pixels), which the step casts.
        trains_only: Whether the step fails in eval mode (an auxiliary head that is there in training alone); it is read
            in the mode that it is in.
    """

    step: str
    input: Path
    target: Path | None
    kind: str
    module: str | None = None
    stop_at_module: bool = False
    shape: tuple[int, ...] | None = None
    cast: bool = False
    ignore_index: int = -100
    differentiable: bool = True
    others: tuple[Path, ...] = ()
    integer: bool = False
    trains_only: bool = False

    @property
    def inputs(self) -> Inputs:
        """The input as attacks see it."""
        return Inputs((self.input, *self.others), self.integer)

    @property
    def found(self) -> str:
        """Targets, loss and module in words, for the user to check."""
        target = "made by the step" if self.target is None else shown(self.target) + " (cast)" * self.cast
        source = "" if self.module is None else f" from {self.module or 'forward'!r}"
        return f"targets {target}, {self.kind}{source}"

    def logits_from(self, output: Tensor) -> Tensor:
        """The logits as the loss gets them, from the module's output."""
        return output if self.shape is None else output.reshape(-1, *self.shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and strings, for checkpoints."""
        plain: dict[str, Any] = _mapped(asdict(self), tuple, list)
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Route:
        """The inverse of :meth:`to_dict`."""
        known = {f.name for f in fields(cls)}  # a later version may have written more
        return cls(**_mapped({name: value for name, value in plain.items() if name in known}, list, tuple))


def _mapped(node: Any, old: type[Any], new: type[Any]) -> Any:
    """Nested tuples as lists, or the other way round."""
    if isinstance(node, dict):
        return {name: _mapped(child, old, new) for name, child in node.items()}
    return new(_mapped(child, old, new) for child in node) if isinstance(node, old) else node


def call_at(route: Route, output: Tensor, leaf: Any) -> LossCall:
    """The loss call that a step makes (or would make) of its module's output and a leaf of its batch."""
    options = {} if route.ignore_index == -100 else {"ignore_index": route.ignore_index}
    call = LossCall(route.kind, route.logits_from(output), leaf, options)  # type: ignore[arg-type]  # a kind, stored as text
    conformed = call.conformed(leaf) if isinstance(leaf, Tensor) else None
    return call if conformed is None else replace(call, target=conformed)


@contextmanager
def outputs_into(outputs: dict[str, list[Tensor]], module: nn.Module) -> Iterator[None]:
    """Collect what every submodule returns, by name, while something runs; without what was written into later."""
    versions: dict[int, int] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.setdefault(name, []).append(output)
                # A compiler that traces this hook knows no versions, and inference tensors count none.
                if not torch.compiler.is_compiling() and not output.is_inference():
                    versions[id(output)] = output._version

        return hook

    parts = [(name, part) for name, part in module.named_modules() if not isinstance(part, torch.jit.ScriptModule)]
    handles = [part.register_forward_hook(keep(name)) for name, part in parts]  # scripted modules take no hooks
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for name, seen in list(outputs.items()):
        # Who hears such an output when it leaves its module hears something else than the loss gets.
        if any(id(output) in versions and output._version != versions[id(output)] for output in seen):
            del outputs[name]


def producer_of(logits: Tensor, outputs: dict[str, list[Tensor]]) -> str | None:
    """The outermost submodule that ran once and whose output is the logits, or a view of the same memory.

    The module itself (``""``) comes last: another step may call ``self.net(x)`` where this one calls ``self(x)``.
    """

    def same(output: Tensor) -> bool:
        shares = (
            output.data_ptr() == logits.data_ptr() and output.numel() == logits.numel() and output.dtype == logits.dtype
        )
        # Shared memory may also be read in another order (a transposed view): that is not the same numbers.
        return output is logits or (shares and torch.equal(output.reshape(logits.shape), logits))

    # Hooks of inner modules fire first, so the last match encloses the others.
    matches = [name for name, seen in outputs.items() if len(seen) == 1 and same(seen[0])]
    return max(matches, key=lambda name: (name != "", matches.index(name)), default=None)


def target_of(call: LossCall, batch: Any, fed: Any, followed: Followed) -> tuple[Path | None, bool]:
    """Where in the batch the loss's target is, and whether the step casts it; ``(None, False)`` if it makes its own.

    Args:
        call: The loss call.
        batch: The batch as it was.
        fed: The batch that the step got, and may have written into.
        followed: Leaves of the batch, as they are and after casts and views.
    """
    target = call.target
    for path, leaf in leaves(fed):
        if (
            isinstance(leaf, Tensor)
            and leaf.numel()
            and (leaf is target or (leaf.data_ptr() == target.data_ptr() and leaf.shape == target.shape))
        ):
            original = get(batch, path)
            if original.dtype == target.dtype and torch.equal(original, target.detach()):
                return path, False
    if id(target) in followed:
        path, _ = followed[id(target)]
        conformed = call.conformed(get(batch, path))
        if conformed is not None and conformed.dtype == target.dtype and torch.equal(conformed, target.detach()):
            return path, True
    return None, False
