"""One call of a user's step: which function, on which module, with which arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from lightning_robust.attach.inputs import Inputs
from lightning_robust.attach.patch import unpatched

__all__ = ["Step", "defines"]

LIGHTNING = ("pytorch_lightning.", "lightning.")


@dataclass(frozen=True)
class Step:
    """A call of ``training_step``, ``validation_step`` or ``test_step`` as Lightning makes it.

    Attributes:
        module: The module whose step it is.
        name: The step's name.
        function: The user's own function, bound; never our wrapper.
        args: What Lightning passes: the batch and, if the step takes them, its indices.
        tracked: Inputs by where they are in the batch, as leaves of the graph that the step built.
    """

    module: nn.Module
    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    tracked: Mapping[Inputs, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module, name: str, *args: Any) -> Step:
        """The call ``module.name(*args)``, with as many of ``args`` as the step takes."""
        function = unpatched(module, name)
        # What wraps a bound method (torch's register_fsdp_forward_method) shows that method's arguments less one.
        inner = inspect.unwrap(function)
        kinds = [p.kind for p in inspect.signature(inner if inspect.ismethod(inner) else function).parameters.values()]
        if inspect.Parameter.VAR_POSITIONAL not in kinds:
            takes = sum(
                k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for k in kinds
            )
            args = args[:takes]
        return cls(module, name, function, args)

    @property
    def batch(self) -> Any:
        """The batch."""
        return self.args[0]

    def with_batch(self, batch: Any) -> Step:
        """The same call on another batch."""
        return replace(self, args=(batch, *self.args[1:]))

    def run(self) -> Any:
        """Make the call."""
        return self.function(*self.args)


def defines(module: object, name: str) -> bool:
    """Whether the user wrote this step or loader (Lightning's base classes have empty ones)."""
    if name in vars(module):
        return True
    return any(name in vars(c) for c in type(module).__mro__ if not f"{c.__module__}.".startswith(LIGHTNING))
