"""Replace a method on one instance, and put back exactly what was there."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

__all__ = ["patch", "unpatched"]

_ABSENT = object()


def patch(obj: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Put ``around(self, original, *args)`` in the place of ``obj.name``; returns what undoes it.

    The signature stays visible (Lightning decides by it what a step is given). The wrapper is a method over a function
    that finds the original through ``self``: a deep copy of the object calls its own code, not that of the original.
    """
    previous = vars(obj).get(name, _ABSENT)

    def original_of(self: Any) -> Callable[..., Any]:
        # torch.compile leaves its result on the instance; that is what has to be called, and put back.
        bound: Callable[..., Any] = getattr(type(self), name).__get__(self) if previous is _ABSENT else previous
        return bound

    template = getattr(type(obj), name) if previous is _ABSENT else previous

    @functools.wraps(template)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(self, original_of(self), *args, **kwargs)

    # Lightning looks below one wrapper only: a step that its author had wrapped already must be what it finds there.
    wrapper.__wrapped__ = inspect.unwrap(template)
    wrapper._original_of = original_of  # type: ignore[attr-defined]  # read by `unpatched`
    method = types.MethodType(wrapper, obj)
    vars(obj)[name] = method

    def undo() -> None:
        if vars(obj).get(name) is not method:  # somebody patched over us, or it is undone already
            return
        if previous is _ABSENT:
            del vars(obj)[name]
        else:
            vars(obj)[name] = previous

    return undo


def unpatched(obj: Any, name: str) -> Callable[..., Any]:
    """The method as it would be without :func:`patch`."""
    method = getattr(obj, name)
    original_of = getattr(getattr(method, "__func__", None), "_original_of", None)
    original: Callable[..., Any] = method if original_of is None else original_of(obj)
    return original
