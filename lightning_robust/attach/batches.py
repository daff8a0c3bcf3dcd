"""Batches of any make: where their tensors are, and the same batch with some of them replaced."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "InputKey",
    "Key",
    "Path",
    "as_path",
    "as_paths",
    "copied",
    "described",
    "get",
    "leaves",
    "one_input",
    "rebuilt",
    "resized",
    "selected",
    "shown",
]

Path = tuple[str | int, ...]
"""Where a leaf is: keys, indices and attribute names from the batch inwards. A bare tensor has the path ``()``."""


Key = str | int | tuple[str | int, ...]
"""How a user names a leaf."""

InputKey = Key | list[Key]
"""How a user names the input, or several inputs."""


def as_path(key: Key) -> Path:
    """The path that a user's ``target_key=`` or ``mask_key=`` names."""
    return tuple(key) if isinstance(key, (tuple, list)) else (key,)


def one_input(key: Any, who: str) -> Any:
    """``key``, if it names one input.

    Raises:
        ValueError: If it is a list of several.
    """
    if isinstance(key, list):
        raise ValueError(
            f"{who} is about one input, got input_key={key!r}: name one of them; a path inwards is a tuple, "
            "input_key=('pair', 0)."
        )
    return key


def as_paths(key: InputKey) -> tuple[Path, ...]:
    """The paths that a user's ``input_key=`` names: one (a key, an index, or a tuple of them), or a list of such.

    Example:
        >>> as_paths(("pair", 0)), as_paths(["left", ("pair", 0)])
        ((('pair', 0),), (('left',), ('pair', 0)))
    """
    return tuple(map(as_path, key)) if isinstance(key, list) else (as_path(key),)


def _items(node: Any) -> list[tuple[str | int, Any]] | None:
    """The children of a container, or None for a leaf."""
    if isinstance(node, Mapping):
        return list(node.items())
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return list(zip(node._fields, node, strict=True))
    if isinstance(node, (list, tuple)):
        return list(enumerate(node))
    if isinstance(node, (Tensor, nn.Module, type, Enum)) or callable(node):
        return None
    slots = [name for kind in type(node).__mro__ for name in getattr(kind, "__slots__", ()) if hasattr(node, name)]
    return [(n, getattr(node, n)) for n in slots if n != "__weakref__"] + list(
        getattr(node, "__dict__", {}).items()
    ) or None


def leaves(batch: Any) -> Iterator[tuple[Path, Any]]:
    """All leaves of a batch (lists, tuples, mappings, named tuples, dataclasses and plain objects) with their paths.

    Example:
        >>> list(leaves({"image": 1, "meta": [2, None]}))
        [(('image',), 1), (('meta', 0), 2), (('meta', 1), None)]
    """
    yield from _leaves(batch, ())


def _leaves(node: Any, above: tuple[int, ...]) -> Iterator[tuple[Path, Any]]:
    # An object that is inside of itself (a parent pointer) is a leaf there.
    items = None if id(node) in above else _items(node)
    if items is None:
        yield (), node
        return
    for name, child in items:
        for path, leaf in _leaves(child, (*above, id(node))):
            yield (name, *path), leaf


def get(batch: Any, path: Path) -> Any:
    """The leaf at a path.

    Raises:
        KeyError: If the batch has nothing there; the message lists what it has.
    """
    node = batch
    for name in path:
        children = dict(_items(node) or [])
        # A named tuple may be addressed by position as well.
        if (
            name not in children
            and isinstance(name, int)
            and isinstance(node, tuple)
            and -len(node) <= name < len(node)
        ):
            node = node[name]
        elif name in children:
            node = children[name]
        else:
            raise KeyError(
                f"the batch has nothing at {shown(path)}; it has {', '.join(shown(p) for p, _ in leaves(batch))}."
            )
    return node


def rebuilt(batch: Any, replace: Mapping[Path, Any], leaf: Callable[[Any], Any] = lambda value: value) -> Any:
    """A batch of the same make in new containers: some leaves replaced, the others passed through ``leaf``.

    Example:
        >>> batch = {"image": 1, "meta": [2, 3]}
        >>> rebuilt(batch, {("meta", 0): 20}), batch
        ({'image': 1, 'meta': [20, 3]}, {'image': 1, 'meta': [2, 3]})
    """
    return _rebuilt(batch, (), (), replace, leaf)


def _rebuilt(
    node: Any, here: Path, above: tuple[int, ...], replace: Mapping[Path, Any], leaf: Callable[[Any], Any]
) -> Any:
    if here in replace:
        return replace[here]
    items = None if id(node) in above else _items(node)
    if items is None:
        return leaf(node)
    inside = (*above, id(node))
    children = {name: _rebuilt(child, (*here, name), inside, replace, leaf) for name, child in items}
    if isinstance(node, Mapping):
        if not isinstance(node, (dict, UserDict)):
            # A copy of somebody's own mapping may share its store, and writing would reach the user's batch.
            return type(node)(children)  # type: ignore[call-arg]  # as Lightning does when it moves a batch
        fresh = copy.copy(node)  # keeps the type: defaultdict, OrderedDict, a tokenizer's BatchEncoding
        fresh.update(children)
        return fresh
    if isinstance(node, tuple):
        return type(node)(*children.values()) if hasattr(node, "_fields") else type(node)(children.values())
    if isinstance(node, list):
        return type(node)(children.values())
    fresh = copy.copy(node)
    for name, child in children.items():
        object.__setattr__(fresh, str(name), child)  # also where the dataclass is frozen
    return fresh


def copied(leaf: Any) -> Any:
    """A copy of a tensor, anything else as it is."""
    # Outside inference mode a clone of an inference tensor is a normal one.
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def resized(batch: Any, n: int, wanted: int) -> Any:
    """A batch of ``n`` samples as one of ``wanted``: samples are left out at the end, or repeated from the start.

    What has no ``n`` rows (a scalar, a shared mask) stays as it is.

    Example:
        >>> resized({"x": torch.tensor([1, 2, 3]), "scale": 2.0}, 3, 5)
        {'x': tensor([1, 2, 3, 1, 2]), 'scale': 2.0}
    """
    return selected(batch, n, [i % n for i in range(wanted)])


def selected(batch: Any, n: int, rows: Sequence[int]) -> Any:
    """Some samples of a batch of ``n``, in this order.

    What has no ``n`` rows (a scalar, a shared mask) stays as it is.

    Example:
        >>> selected({"x": torch.tensor([1, 2, 3]), "name": ["a", "b", "c"]}, 3, [2, 0])
        {'x': tensor([3, 1]), 'name': ['c', 'a']}
    """
    index = torch.tensor(rows, dtype=torch.long)

    def these(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == n:
            return leaf[index.to(leaf.device)]
        return leaf

    changed: dict[Path, Any] = {}
    for path, _ in leaves(batch):
        node = get(batch, path[:-1])
        # Names, ids and other things that are no tensors come as lists with one entry a sample.
        if path[1:] and type(node) in (list, tuple) and len(node) == n and not any(map(_has_parts, node)):
            changed[path[:-1]] = type(node)(node[i] for i in rows)
    return rebuilt(batch, changed, these)


def _has_parts(entry: Any) -> bool:
    return isinstance(entry, Tensor) or _items(entry) is not None


def shown(path: Path) -> str:
    """A path as a person would write it: ``batch['image']``, ``batch[0][1]``.

    Example:
        >>> shown((0, "image"))
        "batch[0]['image']"
    """
    return "batch" + "".join(f"[{name!r}]" for name in path)


def described(batch: Any) -> str:
    """Every leaf with its type and shape, for error messages; of a list of names or numbers only how many.

    Example:
        >>> described({"x": torch.zeros(2, 3), "site": ["a", "b"]})
        "batch['x'] float32 (2, 3), batch['site'] 2 x str"
    """
    plain: dict[Path, list[str]] = {}
    for path, leaf in leaves(batch):
        if isinstance(leaf, torch.Tensor):
            plain[path] = [f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"]
        else:
            above = get(batch, path[:-1]) if len(path) > 1 else None
            listed = isinstance(above, (list, tuple)) and isinstance(leaf, (str, int, float))
            plain.setdefault(path[:-1] if listed else path, []).append(type(leaf).__name__)
    parts = [
        f"{shown(path)} {found[0] if len(found) == 1 else f'{len(found)} x {found[0]}'}"
        for path, found in plain.items()
    ]
    return ", ".join(parts[:12]) + (f" and {len(parts) - 12} more" if len(parts) > 12 else "") or "an empty batch"
