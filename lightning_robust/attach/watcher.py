"""Sees the loss calls of a running step, stops it there, and keeps it quiet meanwhile."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_robust.attach.batches import Path
from lightning_robust.attach.step import Step
from lightning_robust.losses import LOSSES, LossCall
from lightning_robust.modes import frozen
from lightning_robust.randomness import RandomState

__all__ = [
    "UNSCALED",
    "Followed",
    "LossWatcher",
    "NoLossError",
    "ProbeError",
    "Stop",
    "is_unheard",
    "quiet",
    "run_until_stop",
    "unheard",
]

_TORCH = str(pathlib.Path(torch.__file__).parent)
# Where a loss is written by hand, the logits went through one of these.
_SQUASHING = {
    F.softmax, F.log_softmax, F.logsigmoid, F.sigmoid, torch.softmax, torch.log_softmax, torch.sigmoid, torch.logsumexp,
    Tensor.softmax, Tensor.log_softmax, Tensor.sigmoid, Tensor.logsumexp,
}  # fmt: skip

# Steps log their inputs; what needs no gradient there must not fail or warn because ours has one.
_TO_PYTHON = {
    Tensor.numpy, Tensor.__array__, Tensor.__float__, Tensor.__int__, Tensor.__complex__, Tensor.item, Tensor.tolist,
    Tensor.__deepcopy__,
}  # fmt: skip

# What may happen to a label on its way to the loss without its becoming another label.
_CASTS = {
    Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.long, Tensor.int,
    Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.squeeze, Tensor.unsqueeze, Tensor.contiguous, Tensor.view_as,
    Tensor.reshape_as, Tensor.type_as, Tensor.detach, Tensor.clone, Tensor.cpu, Tensor.cuda, torch.flatten,
    torch.squeeze, torch.unsqueeze, torch.reshape,
}  # fmt: skip

Followed = dict[int, tuple[Path, Tensor]]
"""Leaves of a batch, as they are and cast: by ``id``, where each is from, and the tensor, so that no id is reused."""


UNSCALED = "_lightning_robust_unscaled"
"""Attribute of logits that were divided by a temperature: the logits as they were, for who measures."""


class ProbeError(RuntimeError):
    """A step could not be read; the message says what was found and which argument helps."""


class NoLossError(ProbeError):
    """A step called no loss that can be read.

    Attributes:
        candidate: What the step last put through a softmax or sigmoid; a hand-written loss has its logits there.
    """

    def __init__(self, message: str, candidate: Tensor | None = None) -> None:
        super().__init__(message)
        self.candidate = candidate


class Stop(BaseException):
    """Ends a step where its logits are known. Not an Exception: user code that catches those must not see it."""


class LossWatcher(TorchFunctionMode):
    """Sees the loss calls of whatever runs inside.

    Args:
        index: Which loss call is wanted, 0 for the first.
        stop: End the step there.
        detach: Keep copies without a graph, which what follows in the step cannot change.
        followed: Leaves of the batch; what casts and views make of them is added.
    """

    def __init__(
        self, index: int = 0, *, stop: bool = False, detach: bool = False, followed: Followed | None = None
    ) -> None:
        super().__init__()
        self.followed = followed
        self.index, self.stop, self.detach = index, stop, detach
        self.count = 0
        self.call: LossCall | None = None
        self.hint: str | None = None
        self.candidate: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _UNHEARD.get() and not self.stop:
            return func(*args, **kwargs)
        if func in LOSSES:
            if self.count == self.index:
                call = LossCall.from_arguments(func, args, kwargs)
                self.call = call.detached() if self.detach else call
                if self.stop:
                    raise Stop
            self.count += 1
        elif func in _SQUASHING and args and isinstance(args[0], Tensor):
            self.candidate = args[0]
            self.hint = f"{getattr(func, '__name__', 'a softmax')} of a tensor {tuple(args[0].shape)} {_place()}"
        elif func in _TO_PYTHON and args:
            args = (args[0].detach(), *args[1:])
        result = func(*args, **kwargs)
        if self.followed is not None and (func in _CASTS or _adds_dimensions(func, args)):
            known = self.followed.get(id(args[0])) if args else None
            if known is not None and isinstance(result, Tensor):
                self.followed[id(result)] = (known[0], result)
        return result


def _adds_dimensions(func: Any, args: Any) -> bool:
    """``y[:, None]``: new dimensions, everything else as it is."""
    if func is not Tensor.__getitem__:
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return all(part is None or part is Ellipsis or (isinstance(part, slice) and part == slice(None)) for part in index)


def _place() -> str:
    frame = sys._getframe(2)
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(_TORCH) or frame.f_code.co_filename == __file__
    ):
        frame = frame.f_back
    return f"in {frame.f_code.co_name} ({pathlib.Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


_UNHEARD: ContextVar[bool] = ContextVar("_UNHEARD", default=False)


@contextmanager
def unheard() -> Iterator[None]:
    """What runs inside is ours: nobody who listens to the user's step takes it for that step."""
    token = _UNHEARD.set(True)
    try:
        yield
    finally:
        _UNHEARD.reset(token)


def is_unheard() -> bool:
    """Whether something of ours is running."""
    return _UNHEARD.get()


@contextmanager
def quiet(module: nn.Module, training: bool | None, keep_buffers: bool) -> Iterator[RandomState]:
    """The module frozen, its ``log`` calls muted and its ``manual_backward`` fenced."""
    with unheard(), frozen(module, training=training, keep_buffers=keep_buffers) as state:
        for part in module.modules():
            if hasattr(type(part), "log_dict"):  # this module, and LightningModules inside of it
                # Restored with all other attributes by `frozen`.
                vars(part).update(log=_muted, log_dict=_muted, manual_backward=_fenced)
        yield state


def _muted(*_args: Any, **_kwargs: Any) -> None:
    """Stands in for ``log`` and ``log_dict`` while a step is read."""


def _fenced(*_args: Any, **_kwargs: Any) -> None:
    raise ProbeError(
        "the step calls manual_backward before the loss that is to be read; reading on would train. Use a "
        "smaller loss_index= or logits_fn=."
    )


def run_until_stop(step: Step, watcher: LossWatcher | None) -> None:
    """Run a step until the watcher, or a hook, stops it."""
    try:
        if watcher is None:
            step.run()
        else:
            with watcher:
                step.run()
    except Stop:
        return
