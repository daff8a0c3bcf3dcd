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
    undo: list[Undo] = []
    random_state = RandomState.capture()
    try:
        _remember_module(module, undo, set(), keep_buffers)
        for parameter in module.parameters():
            if parameter.is_inference():
                raise RuntimeError(
                    f"a parameter of {type(module).__name__} was created under torch.inference_mode(); autograd cannot "
                    f"differentiate through it. Create the module outside of inference mode."
                )
            parameter.grad = None
        if training is not None:
            module.train(training)
        with torch.inference_mode(False), torch.enable_grad():
            yield random_state
    finally:
        for put_back in reversed(undo):
            put_back()
        random_state.restore()


def _remember_module(module: nn.Module, undo: list[Undo], seen: set[int], keep_buffers: bool) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    # The training flag is an attribute like others: restoring the dict restores it, for each module by itself.
    attributes = module.__dict__
    for name, value in attributes.items():
        if name == "_parameters":
            for parameter in value.values():
                if parameter is not None:
                    _remember_parameter(parameter, undo)
        elif name != "_buffers" or not keep_buffers:
            _remember(value, undo, seen, keep_buffers)
    undo.append(_restorer(attributes, dict(attributes)))


def _remember_parameter(parameter: Tensor, undo: list[Undo]) -> None:
    grad, flag = parameter.grad, parameter.requires_grad

    def put_back() -> None:
        parameter.grad = grad
        if parameter.requires_grad != flag:
            parameter.requires_grad_(flag)

    undo.append(put_back)


def _remember(value: Any, undo: list[Undo], seen: set[int], keep_buffers: bool) -> None:
    """Append what restores ``value`` if it is something that a step changes in place."""
    if isinstance(value, (str, int, float, bool, type(None))) or id(value) in seen:
        return
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter):
            _remember_tensor(value, undo)
    elif isinstance(value, (list, deque, dict, set)):
        seen.add(id(value))
        undo.append(_restorer(value, value.copy()))
        for item in value.values() if isinstance(value, dict) else value:
            _remember(item, undo, seen, keep_buffers)
    elif isinstance(value, tuple):
        for item in value:
            _remember(item, undo, seen, keep_buffers)
    elif isinstance(value, nn.Module):
        # Submodules come here as well, through `_modules`; so do metrics that somebody keeps in a plain list.
        _remember_module(value, undo, seen, keep_buffers)


def _remember_tensor(tensor: Tensor, undo: list[Undo]) -> None:
    before = tensor.detach().clone()

    def put_back() -> None:
        # Always: batch_norm moves its running statistics without counting a version. Through `.data`, which counts none
        # either: a pending graph that saved this tensor stays valid, as the values are those that it saved.
        if tensor.is_inference():
            with torch.inference_mode():
                tensor.copy_(before)
        else:
            tensor.data.copy_(before)

    undo.append(put_back)


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
