"""What a prediction depends on: attribution maps of one logit, all with the signature ``(logits_fn, x, target)``.

What else a method needs are keyword parameters with fixed names, which callers find by ``inspect.signature``:
``layer`` (class activation maps), ``module`` (methods that hook what ``logits_fn`` runs), ``baseline``, ``seed``, and
``chunk_size`` in all of them.

The maps cannot be trained through: captum leaves no path back to the parameters. Penalties have their own gradients.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_robust.saliency.cam import gradcam, layercam
from lightning_robust.saliency.foreign import from_captum, is_captum
from lightning_robust.saliency.gradients import gradient, input_x_gradient, integrated_gradients, smoothgrad
from lightning_robust.saliency.hidden_tiles import hidden_tiles
from lightning_robust.saliency.occlusion import occlusion
from lightning_robust.saliency.relevance import deep_lift, lrp
from lightning_robust.saliency.rollout import attention_rollout

__all__ = [
    "METHODS",
    "as_method",
    "attention_rollout",
    "deep_lift",
    "from_captum",
    "gradcam",
    "gradient",
    "hidden_tiles",
    "input_x_gradient",
    "integrated_gradients",
    "layercam",
    "lrp",
    "method_named",
    "occlusion",
    "smoothgrad",
]

METHODS: dict[str, Callable[..., Tensor]] = {
    "gradient": gradient,
    "integrated_gradients": integrated_gradients,
    "gradcam": gradcam,
    "layercam": layercam,
    "smoothgrad": smoothgrad,
    "input_x_gradient": input_x_gradient,
    "occlusion": occlusion,
    "hidden_tiles": hidden_tiles,
    "attention_rollout": attention_rollout,
    "deep_lift": deep_lift,
    "lrp": lrp,
}
"""The methods by name; all start ``(logits_fn, x, target)``."""

# captum's own would not say where they do not hold.
_CHECKED: dict[str, Callable[..., Tensor]] = {"DeepLift": deep_lift, "LRP": lrp}

_OFFERED = ("layer", "module", "baseline", "seed", "chunk_size")
"""Names of what callers can give a method besides."""


def method_named(name: str) -> Callable[..., Tensor]:
    """The saliency method of this name.

    Raises:
        ValueError: If there is none, with the nearest.

    Example:
        >>> method_named("gradient") is gradient
        True
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, 1, cutoff=0.3)
    raise ValueError(
        f"a saliency method must be one of {', '.join(METHODS)}; got {name!r}."
        + (f" Did you mean {near[0]!r}?" if near else "")
    )


def as_method(given: Any) -> tuple[str, Callable[..., Tensor]]:
    """A saliency method by name, as a function, or from captum: its name for log keys, and the function.

    Args:
        given: A name of :data:`METHODS`; a callable ``(logits_fn, x, target, ...) -> maps`` whose further parameters
            have defaults or one of the names ``layer``, ``module``, ``baseline``, ``seed`` and ``chunk_size``, also a
            ``functools.partial``; or a class or an instance of captum, for :func:`from_captum`. captum's classes
            ``DeepLift`` and ``LRP`` become the checked :func:`deep_lift` and :func:`lrp`.

    Returns:
        The name, of letters, digits, ``_``, ``-`` and ``.``: of a callable its ``name``, ``__name__`` or class; of a
        captum class like ``DeepLift`` it is ``deep_lift``.

    Raises:
        ValueError: If there is no such method, with the names and the nearest one; or if a callable has no name, or
            asks for what nobody can give.

    Example:
        >>> as_method("gradient") == ("gradient", gradient)
        True
        >>> as_method(functools.partial(smoothgrad, samples=50))[0]
        'smoothgrad'
        >>> from captum.attr import GuidedBackprop
        >>> as_method(GuidedBackprop)[0]
        'guided_backprop'
    """
    if isinstance(given, str):
        return given, method_named(given)
    if isinstance(given, type) and is_captum(given) and given.__name__ in _CHECKED:
        given = _CHECKED[given.__name__]
    function = from_captum(given) if is_captum(given) else given
    if not callable(function) or isinstance(function, type):
        raise ValueError(
            f"a saliency method must be one of {', '.join(METHODS)}, a callable (logits_fn, x, target) -> maps, or an "
            f"attribution of captum; got {given!r}."
        )
    name = _name(function)
    if not all(letter.isalnum() or letter in "_-." for letter in name):
        raise ValueError(
            f"a saliency method is logged by its name, and {name!r} is none: write a function with `def`, or give the "
            f"object an attribute `name`."
        )
    _check_signature(name, function)
    return name, function


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "name", None) or getattr(function, "__name__", type(function).__name__))


def _check_signature(name: str, function: Callable[..., Tensor]) -> None:
    signature = inspect.signature(function)
    extra = {key: None for key in _OFFERED if key in signature.parameters}
    try:
        signature.bind(None, None, None, **extra)
    except TypeError as error:
        raise ValueError(
            f"{name}{signature} cannot be called as a saliency method, (logits_fn, x, target) and any of "
            f"{', '.join(_OFFERED)}: {error}. Give other parameters defaults, or a functools.partial."
        ) from error
