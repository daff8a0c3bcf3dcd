"""Any attribution of captum as a saliency method of ours."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.modes import frozen
from lightning_robust.protocols import LogitsFn
from lightning_robust.randomness import reseed, untouched_random_state
from lightning_robust.saliency.explaining import broadcast, explained, without_channels
from lightning_robust.saliency.grids import as_feature_map, enlarged_to

__all__ = ["StandIn", "from_captum", "is_captum", "lent"]

_KEYWORD = inspect.Parameter.KEYWORD_ONLY
# What comes before the parameters that depend on the attribution.
_FIRST = [
    *(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("logits_fn", "x", "target")),
    inspect.Parameter("chunk_size", _KEYWORD, default=None),
]
_DEFAULTS = {"seed": 0, "baseline": 0.0}


class StandIn(nn.Module):
    """A module for those who take modules alone: it runs a function, and shows the submodules that may be hooked.

    Args:
        function: Inputs to logits.
        parts: What the function runs.
    """

    def __init__(self, function: LogitsFn, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self._function = (function,)  # a function that is a module must not become a part
        for i, part in enumerate(parts):
            self.add_module(str(i), part)

    def forward(self, x: Tensor) -> Tensor:
        return self._function[0](x)

    def state_dict(self, *_args: Any, **_kwargs: Any) -> Any:
        """Nothing: captum would load it back, which counts as a change of the weights."""
        return {}

    def load_state_dict(self, *_args: Any, **_kwargs: Any) -> Any:
        """Nothing is loaded."""


@contextmanager
def lent(name: str, *modules: nn.Module, instead: str = "Use another method.") -> Iterator[None]:
    """Modules in the hands of captum: all that it sets on them is taken off, and what it cannot do is a ValueError.

    Args:
        name: Of captum's class, for the error.
        modules: What it may touch.
        instead: A sentence for the error.

    Raises:
        ValueError: For what captum raises, of whatever type, or the model below it.
    """
    # Rules may replace weights; their places in memory are put back, too.
    weights = [(parameter, parameter.data) for module in modules for parameter in module.parameters()]
    try:
        with ExitStack() as stack, warnings.catch_warnings():
            for module in modules:
                stack.enter_context(frozen(module, training=None))
            for said in (r"\s*Setting (forward|backward)", "You are providing multiple inputs for Lime"):
                warnings.filterwarnings("ignore", message=said, category=UserWarning)
            yield
    except torch.cuda.OutOfMemoryError:
        raise
    except (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        kinds = " and ".join(type(module).__name__ for module in modules) or "this model"
        raise ValueError(f"captum's {name} cannot follow {kinds}: {error} {instead}") from error
    finally:
        for parameter, data in weights:
            if parameter.data is not data:
                parameter.data = data


def is_captum(given: Any) -> bool:
    """Whether this is a class of captum's attributions, or an instance of one (or of a subclass).

    Example:
        >>> from captum.attr import Saliency
        >>> is_captum(Saliency), is_captum(Saliency(abs)), is_captum(abs)
        (True, True, False)
    """
    kind = given if isinstance(given, type) else type(given)
    return hasattr(kind, "attribute") and any(base.__module__.startswith("captum.") for base in kind.__mro__)


def from_captum(attribution: Any, **attribute_kwargs: Any) -> Callable[..., Tensor]:
    """An attribution of captum as one of our methods.

    A class is built anew for every call, around the ``logits_fn`` that the method is given; yes/no heads, contexts
    without gradients, chunks and the sum over channels are as for our own methods. The method asks for ``module`` if
    captum's class hooks a model's parts, and for ``layer`` if it looks at one. A ready instance is used as it is, with
    the function that it was built around, which must give ``(N, K)``; ``logits_fn`` is not called then.

    Random numbers come from the global streams, seeded by ``seed`` for the call; the streams go on as if nothing had
    happened. Methods with noise therefore depend on the batch. What captum sets on modules is taken off again.

    captum applies its rules where it finds modules of the right type, and says nothing where it does not: prefer
    :func:`~lightning_robust.saliency.methods.deep_lift` and :func:`~lightning_robust.saliency.methods.lrp`, which
    check, over captum's own classes.

    Args:
        attribution: A class, like ``GuidedBackprop`` or ``LayerGradientXActivation``, or an instance, like
            ``NoiseTunnel(Saliency(model))``.
        attribute_kwargs: For its ``attribute``, like ``n_steps=50``. Without ``baselines`` the method takes a
            ``baseline``, if captum does.

    Returns:
        ``(logits_fn, x, target, *, chunk_size=None, ...) -> maps (N, ...)``; a layer's maps are enlarged to the input,
        tokens laid out as its grid of patches. Its signature shows what it asks for, its ``name`` what it is.

    Raises:
        ValueError: If this is no attribution of captum, its class cannot be built from a function or a module, or
            ``attribute`` does not take these arguments or needs others. Calling it: if captum cannot follow the model,
            or its maps are not maps over the input.

    Example:
        >>> import torch
        >>> from captum.attr import ShapleyValueSampling
        >>> shapley = from_captum(ShapleyValueSampling, n_samples=5)
        >>> inspect.signature(shapley)
        <Signature (logits_fn, x, target, *, chunk_size=None, seed=0, baseline=0.0)>
        >>> weight = torch.tensor([[1.0, 3.0], [1.0, -4.0]])
        >>> shapley(lambda x: x @ weight, torch.tensor([[1.0, 2.0]]), torch.tensor([1]))
        tensor([[ 3., -8.]])
    """
    if not is_captum(attribution):
        raise ValueError(f"from_captum takes a class or an instance of captum.attr, got {attribution!r}.")
    method = _FromCaptum(attribution, attribute_kwargs)
    method.check()
    return method


@dataclass(frozen=True, eq=False)
class _FromCaptum:
    """See :func:`from_captum`."""

    attribution: Any
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", self._kind.__name__).lower()

    @property
    def __signature__(self) -> inspect.Signature:
        own = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=_DEFAULTS.get(name, inspect.Parameter.empty)
            )
            for name in self._needs
        ]
        return inspect.Signature([*_FIRST, *own])

    @property
    def _kind(self) -> Any:
        return self.attribution if isinstance(self.attribution, type) else type(self.attribution)

    @property
    def _built(self) -> list[str]:
        """What the class is built from; of an instance, nothing."""
        if not isinstance(self.attribution, type):
            return []
        return [name for name in inspect.signature(self.attribution).parameters if name in ("model", "layer")]

    @property
    def _takes(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self._kind.attribute).parameters

    @property
    def _needs(self) -> list[str]:
        baselines = self._takes.get("baselines")
        # Without a default they are a sample of the data, not a point.
        point = baselines is not None and baselines.default is None and "baselines" not in self.settings
        built = {"model": "module", "layer": "layer"}
        return [*(built[name] for name in self._built), "seed", *(["baseline"] if point else [])]

    def check(self) -> None:
        """Fail now, not in the middle of a run.

        Raises:
            ValueError: See :func:`from_captum`.
        """
        name = self._kind.__name__
        if isinstance(self.attribution, type):
            first = next(iter(inspect.signature(self.attribution).parameters), "")
            if first not in ("forward_func", "model"):
                raise ValueError(f"{name} is built from {first!r}, not from a function or a model: give an instance.")
        if "return_convergence_delta" in self.settings:
            raise ValueError("a saliency method returns maps alone; see saliency.completeness for the delta.")
        given = {key: None for key in ("target", "baselines") if key in self._takes} | {**self.settings}
        if "baseline" not in self._needs and "baselines" not in self.settings:
            given.pop("baselines", None)
        try:
            inspect.signature(self._kind.attribute).bind(None, None, **given)
        except TypeError as error:
            raise ValueError(
                f"{name}.attribute{inspect.signature(self._kind.attribute)} does not fit: {error}. Give what it needs "
                f"as keywords, from_captum({name}, ...)."
            ) from error

    def __call__(
        self, logits_fn: LogitsFn, x: Tensor, target: Tensor, *, chunk_size: int | None = None, **given: Any
    ) -> Tensor:
        inspect.signature(self).bind(logits_fn, x, target, **given)  # a TypeError that names what is missing
        self._check_rectifiers(given)
        beside = [broadcast(given.get("baseline", 0.0), x)] if "baseline" in self._needs else []

        def attribute(logits: LogitsFn, x: Tensor, target: Tensor, *start: Tensor) -> Tensor:
            built = self._build(logits, given)
            arguments = {**self.settings, **({"baselines": start[0]} if start else {})}
            if _takes_target(self.attribution):
                arguments["target"] = target
            maps = built.attribute(x, **arguments)
            return self._on_input(maps, x, given.get("layer", getattr(built, "layer", None)))

        touched = [given[name] for name in ("module", "layer") if name in given] + _modules_of(self.attribution)
        with untouched_random_state(), lent(self._kind.__name__, *touched):
            reseed(given.get("seed", 0))
            return explained(attribute, logits_fn, x, target, chunk_size, *beside)

    def _build(self, logits: LogitsFn, given: Mapping[str, Any]) -> Any:
        if not isinstance(self.attribution, type):
            return self.attribution
        function = StandIn(logits, [given["module"]]) if "model" in self._built else logits
        return self.attribution(function, *([given["layer"]] if "layer" in self._built else []))

    def _check_rectifiers(self, given: Mapping[str, Any]) -> None:
        module = given.get("module")
        guided = any(
            base.__name__ in ("ModifiedReluGradientAttribution", "GuidedGradCam") for base in self._kind.__mro__
        )
        if guided and module is not None and not any(isinstance(part, nn.ReLU) for part in module.modules()):
            raise ValueError(
                f"{self._kind.__name__} changes the backward pass of nn.ReLU, and {type(module).__name__} has none: it "
                f"would be the plain gradient. Write torch.relu and F.relu as modules, or use 'gradient'."
            )

    def _on_input(self, maps: Any, x: Tensor, layer: Any) -> Tensor:
        if isinstance(maps, tuple) and maps:
            maps = maps[0]
        if isinstance(maps, Tensor) and maps.shape == x.shape:
            return without_channels(maps)
        if isinstance(maps, Tensor) and isinstance(layer, nn.Module):
            values, _ = as_feature_map(maps, x, layer)
            return enlarged_to(values.sum(1).float(), x.shape)
        got = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(f"{self._kind.__name__} gives {got} for inputs {tuple(x.shape)}: no maps over the input.")


def _takes_target(attribution: Any) -> bool:
    """Some (LayerActivation) look at no class; one that was built around another passes the target on to it."""
    inner = getattr(attribution, "attribution_method", None)
    return "target" in inspect.signature(attribution.attribute).parameters or (
        is_captum(inner) and _takes_target(inner)
    )


def _modules_of(attribution: Any) -> list[nn.Module]:
    """The modules that a ready instance was built around, also where it was built around another instance."""
    if isinstance(attribution, type):
        return []
    inner = getattr(attribution, "attribution_method", None)
    held = [getattr(attribution, name, None) for name in ("model", "forward_func", "layer")]
    return [part for part in held if isinstance(part, nn.Module)] + (_modules_of(inner) if is_captum(inner) else [])
