"""Run a stranger's module without leaving a trace: eval mode, gradients on, everything put back afterwards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.randomness import RandomState

__all__ = ["frozen", "gradients"]

Undo = Callable[[], None]
_IMMUTABLE = {str, int, float, bool, type(None)}


@contextmanager
def gradients(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Leave inference mode, switch gradients on, and yield the tensors in a form that autograd accepts.

    ``torch.enable_grad()`` alone is not enough: ``Trainer.validate`` and ``test`` hand over *inference tensors*, inputs
    and targets alike, which cannot be saved for a backward pass.

    Example:
        >>> with torch.inference_mode():
        ...     x = torch.ones(2)
        ...     with gradients(x) as (x,):
        ...         x.requires_grad_().pow(2).sum().backward()
        >>> x.grad
        tensor([2., 2.])
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield tuple(t.clone() if t.is_inference() else t.detach() for t in tensors)


@contextmanager
def frozen(module: nn.Module, *, training: bool | None = False, keep_buffers: bool = False) -> Iterator[RandomState]:
    """Everything that a forward pass or a training step could change in ``module`` is as before afterwards.

    Restored: the training flag of *every* submodule, buffers, ``requires_grad`` and ``.grad`` of parameters, attributes
    and the lists, dicts and sets they hold, states of torchmetrics objects (registered or kept in a list), and the
    global random streams of torch, numpy and ``random``; also when an exception flies. Inside, gradients are on and
    parameters have no ``.grad``.

    Args:
        module: Any module.
        training: The mode to run in; ``None`` leaves every flag as it is.
        keep_buffers: Let changes of buffers stand (a second training forward that BatchNorm is meant to see).

    Yields:
        The random state at entry, for who wants to replay it.

    Raises:
        RuntimeError: If parameters were created in inference mode, where no gradient can be had.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> with frozen(net, training=True):
        ...     _ = net(torch.randn(4, 2))
        >>> net[1].num_batches_tracked
        tensor(0)
    """
    snapshot = _Snapshot(keep_buffers)
    random_state = RandomState.capture()
    switched: list[tuple[nn.Module, bool]] = []
    try:
        with torch.inference_mode(False):
            snapshot.module(module)
        for parameter in module.parameters():
            if parameter.is_inference():
                raise RuntimeError(
                    f"a parameter of {type(module).__name__} was created under torch.inference_mode(); autograd cannot "
                    f"differentiate through it. Create the module outside of inference mode."
                )
            parameter.grad = None
        if training is not None:
            # Some layers do more than set a flag (LoRA merges weights): those are switched back by their own method.
            own = [part for part in module.modules() if type(part).train is not nn.Module.train]
            switched = [(part, part.training) for part in own if part.training != training]
            module.train(training)
        with torch.inference_mode(False), torch.enable_grad():
            yield random_state
    finally:
        for part, was in switched:
            part.train(was)
        snapshot.restore()
        random_state.restore()


class _Snapshot:
    """What a step could change in place, and how it was."""

    def __init__(self, keep_buffers: bool) -> None:
        self.keep_buffers = keep_buffers
        self._undo: list[Undo] = []
        self._empty: list[Any] = []  # most containers of a module are hook dicts without hooks: no copy, no closure
        self._seen: set[int] = set()

    def restore(self) -> None:
        for put_back in reversed(self._undo):
            put_back()
        for container in self._empty:
            if container:
                container.clear()

    def module(self, module: nn.Module) -> None:
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        # The flag is an attribute like others: restoring the dict restores it, for each module by itself.
        attributes = module.__dict__
        for name, value in attributes.items():
            if name == "_parameters":
                for parameter in value.values():
                    if parameter is not None:
                        self._parameter(parameter)
            elif name != "_buffers" or not self.keep_buffers:
                self._value(value)
        before = dict(attributes)
        self._undo.append(_restorer(attributes, before))
        # What a forward cached in inference mode cannot be differentiated through; a copy can, for the time being.
        for held in (attributes, {} if self.keep_buffers else module._buffers):
            for name, value in list(held.items()):
                if isinstance(value, Tensor) and value.is_inference():
                    held[name] = value.clone()

    def _parameter(self, parameter: Tensor) -> None:
        grad, flag = parameter.grad, parameter.requires_grad

        def put_back() -> None:
            parameter.grad = grad
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)

        self._undo.append(put_back)

    def _value(self, value: Any) -> None:
        if value.__class__ in _IMMUTABLE or id(value) in self._seen:
            return
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter):
                self._tensor(value)
        elif isinstance(value, (list, deque, dict, set)):
            self._seen.add(id(value))
            if not value:
                self._empty.append(value)
                return
            self._undo.append(_restorer(value, value.copy()))
            for item in value.values() if isinstance(value, dict) else value:
                # Tensors in a list are results that a step collects: what is in the list counts. Copying them would
                # make every step of an epoch dearer than the one before.
                if not (isinstance(item, Tensor) and isinstance(value, (list, deque))):
                    self._value(item)
        elif isinstance(value, tuple):
            for item in value:
                self._value(item)
        elif isinstance(value, nn.Module):
            # Submodules come here as well, through `_modules`; so do metrics that somebody keeps in a plain list.
            self.module(value)

    def _tensor(self, tensor: Tensor) -> None:
        before, learnt = tensor.detach().clone(), tensor.requires_grad

        def put_back() -> None:
            # Always: batch_norm moves its running statistics without counting a version. Through `.data`, which counts
            # none either: a pending graph that saved this tensor stays valid, as the values are those that it saved.
            if tensor.is_inference():
                with torch.inference_mode():
                    tensor.copy_(before)
            else:
                if tensor.requires_grad and not learnt:  # statistics of an input that had a gradient in here
                    tensor.detach_()
                tensor.data.copy_(before)

        self._undo.append(put_back)


def _restorer(container: Any, before: Any) -> Undo:
    def put_back() -> None:
        if isinstance(container, dict):
            if list(container) == list(before) and all(container[k] is v for k, v in before.items()):
                return
            container.clear()
            container.update(before)
        elif isinstance(container, set):
            container.clear()
            container.update(before)
        elif len(container) != len(before) or any(a is not b for a, b in zip(container, before, strict=True)):
            container.clear()
            container.extend(before)

    return put_back
