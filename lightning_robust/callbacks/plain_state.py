"""What a detector remembers, as plain values that ``torch.load(weights_only=True)`` reads."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, as_tensor

__all__ = ["plain", "size_in_bytes"]

NUMBER = 8  # bytes


def plain(value: Any, where: str = "state") -> Any:
    """A copy of tensors, numbers, words, lists, tuples and dicts; numpy's arrays become tensors.

    Args:
        value: What :meth:`~lightning_robust.ood.Detector.state` gave.
        where: How errors call it.

    Raises:
        TypeError: If something else is in it.

    Example:
        >>> import numpy as np
        >>> plain({"mean": np.zeros(2), "k": np.int64(5), "kinds": ("near", None)})
        {'mean': tensor([0., 0.], dtype=torch.float64), 'k': 5, 'kinds': ('near', None)}
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return as_tensor(value.copy())
    if isinstance(value, Tensor):
        return value.detach().as_subclass(Tensor)
    if isinstance(value, dict):
        return {plain(key, f"a key of {where}"): plain(child, f"{where}[{key!r}]") for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        children = [plain(child, f"{where}[{i}]") for i, child in enumerate(value)]
        return tuple(children) if isinstance(value, tuple) else children
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)  # of a class of somebody's own, too
    if value is None:
        return None
    what = f"numpy {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
    raise TypeError(
        f"{where} is of type {what}; a checkpoint takes tensors, numpy arrays of numbers, numbers, words, None, lists, "
        "tuples and dicts."
    )


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
