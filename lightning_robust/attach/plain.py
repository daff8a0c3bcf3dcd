"""Plain values: what ``torch.load(weights_only=True)`` reads without this package, and without anybody's classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, as_tensor

__all__ = ["plain", "size_in_bytes"]

NUMBER = 8  # bytes


class _Lost:
    """Stands for what is left out."""


def plain(value: Any, where: str = "state", lost: Callable[[str], None] | None = None) -> Any:
    """A copy of tensors, numbers, words, lists, tuples and dicts; numpy's arrays become tensors.

    Args:
        value: What is to be stored.
        where: How errors call it.
        lost: Is told of what else is in it, which is then left out.

    Raises:
        TypeError: If something else is in it and nobody is to be told.

    Example:
        >>> import numpy as np
        >>> plain({"mean": np.zeros(2), "k": np.int64(5), "kinds": ("near", None)})
        {'mean': tensor([0., 0.], dtype=torch.float64), 'k': 5, 'kinds': ('near', None)}
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return as_tensor(value.copy())
    if isinstance(value, np.ndarray) and value.dtype.kind == "U":
        value = value.tolist()
    if isinstance(value, Tensor):
        return value.detach().as_subclass(Tensor)
    if isinstance(value, Mapping):
        keys = {key: plain(key, f"a key of {where}") if lost is None else _key(key) for key in value}
        parts = {keys[key]: plain(child, f"{where}[{key!r}]", lost) for key, child in value.items()}
        return {key: part for key, part in parts.items() if part is not _Lost}
    if isinstance(value, (list, tuple)):
        children = [plain(child, f"{where}[{i}]", lost) for i, child in enumerate(value)]
        children = [child for child in children if child is not _Lost]
        return tuple(children) if isinstance(value, tuple) else children
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)  # of a class of somebody's own, too
    if value is None:
        return None
    what = f"numpy {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
    message = (
        f"{where} is of type {what}; a checkpoint takes tensors, numpy arrays of numbers, numbers, words, None, lists, "
        "tuples and dicts."
    )
    if lost is None:
        raise TypeError(message)
    lost(message)
    return _Lost


def _key(key: Any) -> str | int:
    """A key as a file can have it, where nothing is to be refused."""
    key = key.item() if isinstance(key, np.generic) else key
    return key if type(key) in (str, int) else str(key)


def size_in_bytes(value: Any) -> int:
    """About how much of a checkpoint plain values take.

    Example:
        >>> import torch
        >>> size_in_bytes({"a": torch.zeros(3), "b": [1.0, 2.0]})
        30
    """
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return size_in_bytes([*value.keys(), *value.values()])
    if isinstance(value, (list, tuple)):
        return sum(map(size_in_bytes, value))
    return len(value) if isinstance(value, str) else NUMBER
