"""How to get from a batch to logits and targets, and how to recognise where they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.attach.batches import Path, get, leaves

__all__ = ["Route", "outputs_into", "producer_of", "target_of"]


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
    """

    step: str
    input: Path
    target: Path | None
    kind: str
    module: str | None = None
    stop_at_module: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and strings, for checkpoints."""
        plain = asdict(self)
        return {**plain, "input": list(self.input), "target": None if self.target is None else list(self.target)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Route:
        """The inverse of :meth:`to_dict`."""
        target = plain["target"]
        return cls(**{**plain, "input": tuple(plain["input"]), "target": None if target is None else tuple(target)})


@contextmanager
def outputs_into(outputs: dict[str, list[Tensor]], module: nn.Module) -> Iterator[None]:
    """Collect what every submodule returns, by name, while something runs."""

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.setdefault(name, []).append(output)

        return hook

    handles = [part.register_forward_hook(keep(name)) for name, part in module.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def producer_of(logits: Tensor, outputs: dict[str, list[Tensor]]) -> str | None:
    """The outermost submodule that ran once and whose output is the logits, or a view of the same memory.

    The module itself (``""``) comes last: another step may call ``self.net(x)`` where this one calls ``self(x)``.
    """

    def same(output: Tensor) -> bool:
        shares = (
            output.data_ptr() == logits.data_ptr() and output.numel() == logits.numel() and output.dtype == logits.dtype
        )
        return output is logits or shares

    # Hooks of inner modules fire first, so the last match encloses the others.
    matches = [name for name, seen in outputs.items() if len(seen) == 1 and same(seen[0])]
    return max(matches, key=lambda name: (name != "", matches.index(name)), default=None)


def target_of(target: Tensor, batch: Any, fed: Any) -> Path | None:
    """Where in the batch the loss's target is, if it is a leaf as it stands."""
    for path, leaf in leaves(fed):
        if (
            isinstance(leaf, Tensor)
            and leaf.numel()
            and (leaf is target or (leaf.data_ptr() == target.data_ptr() and leaf.shape == target.shape))
        ):
            original = get(batch, path)
            if original.dtype == target.dtype and torch.equal(original, target.detach()):
                return path
    return None
