"""What goes into the last linear layer: the features of a sample, heard while the user's step runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.attach.watcher import UNSCALED, ProbeError, is_unheard
from lightning_robust.losses import LossCall

__all__ = ["Caught", "FeatureTap", "Tapped"]


@dataclass(frozen=True, eq=False)
class Caught:
    """The features of a batch.

    Attributes:
        features: ``(N, D)``.
        output: What the last linear layer made of them, ``(N, K)`` or ``(N,)``; None where it is not known.
    """

    features: Tensor
    output: Tensor | None


@dataclass
class Tapped:
    """Features that were caught, one entry a call of the head, each with what the head made of them.

    Attributes:
        calls: Features and outputs of the head (None where no head is known).
    """

    calls: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)

    def of(self, call: LossCall) -> Caught | None:
        """The features that the logits of a loss call were made of; None if they were not caught."""
        for features, output in reversed(self.calls):  # pictures for a log come before or behind: equality decides
            if len(features) == len(call.logits) if output is None else _gives(output, call):
                return Caught(features.flatten(1), output)
        return None


class FeatureTap:
    """Finds the last linear layer of a module and catches what goes into it.

    Args:
        layer: Name of a submodule whose *output* is to be taken instead, ``(N, D)`` or ``(N, C, H, W)``, of which the
            mean over places is taken.

    Attributes:
        head: Name of the linear layer whose output is the logits, once found; None if there is none.
        found: Whether it was looked for.
    """

    def __init__(self, layer: str | None = None) -> None:
        self.layer = layer
        self.head: str | None = None
        self.found = False

    def find(self, module: nn.Module, read: Any) -> None:
        """Find the head; ``read()`` runs the user's step up to its loss.

        Raises:
            ProbeError: If no linear layer's output is the logits, and no layer was named; or if there is no such layer,
                it does not run, or its output is no features.
        """
        if self.layer is not None:
            _submodule(module, self.layer)
        linear = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
        outputs: dict[str, list[Tensor]] = {name: [] for name in linear}

        def keep(name: str) -> Any:
            return lambda _module, _args, output: outputs[name].append(output.detach().clone())

        handles = [part.register_forward_hook(keep(name)) for name, part in linear.items()]
        try:
            call = read()
        finally:
            for handle in handles:
                handle.remove()
        found = [name for name, seen in outputs.items() if any(_gives(output, call) for output in seen)]
        if self.layer is not None:  # one that holds the head, or is it: no head comes behind its output
            found = [name for name in found if not f"{name}.".startswith(f"{self.layer}.")]
        self.head = found[-1] if found else None
        if self.layer is None and self.head is None:
            raise ProbeError(
                f"no linear layer of {type(module).__name__} gives the logits that the loss gets, so its features are "
                f"not known: name the submodule whose output they are, feature_layer='backbone'. It has "
                f"{', '.join(name for name, _ in module.named_modules() if name)}."
            )
        if self.layer is not None:
            with self.open(module) as tapped:
                call = read()
            if tapped.of(call) is None:
                raise ProbeError(
                    f"feature_layer={self.layer!r} gave no features for {len(call.logits)} logits of the step: does it "
                    "run before the last layer, once a sample? Name a submodule that does."
                )
        self.found = True

    def linear(self, module: nn.Module) -> nn.Linear | None:
        """The last linear layer itself."""
        if self.head is None:
            return None
        head = module.get_submodule(self.head)
        return head if isinstance(head, nn.Linear) else None

    @contextmanager
    def open(self, module: nn.Module, *, listening: bool = False) -> Iterator[Tapped]:
        """Catch features while something runs.

        Args:
            module: The user's module.
            listening: Pass over what this package runs itself, but for the last call.
        """
        tapped = Tapped()
        own = -1  # where in `calls` the last of our own forwards is

        def keep(features: Tensor, output: Tensor | None) -> None:
            nonlocal own
            # Copies, since what follows in the step may write into them; and logits as they were before a temperature.
            kept = None if output is None else getattr(output, UNSCALED, output).detach().clone()
            entry = (features.detach().clone(), kept)
            if not (listening and is_unheard()):
                tapped.calls.append(entry)
            elif own < 0:
                own = len(tapped.calls)
                tapped.calls.append(entry)
            else:
                tapped.calls[own] = entry

        handles = self._hooks(module, keep, strict=not listening)
        try:
            yield tapped
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, module: nn.Module, keep: Any, strict: bool) -> list[Any]:
        def head(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            keep(args[0] if args else kwargs["input"], output)

        if self.layer is None:
            return [module.get_submodule(self.head or "").register_forward_hook(head, with_kwargs=True)]
        name = self.layer
        # The layer speaks first, the head (or nobody) behind it says which of several calls it was.
        waiting: list[Tensor] = []

        def layer(_module: nn.Module, _args: Any, output: Any) -> None:
            waiting.clear()
            if not strict and not _is_features(output):
                return  # an error in here would be one of the user's own step
            waiting.append(_pooled(output, name))
            if self.head is None:
                keep(waiting.pop(), None)

        def behind(_module: nn.Module, _args: Any, output: Any) -> None:
            if waiting:
                keep(waiting.pop(), output)

        handles = [_submodule(module, name).register_forward_hook(layer)]
        if self.head is not None:
            handles.append(module.get_submodule(self.head).register_forward_hook(behind))
        return handles


def _submodule(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        names = ", ".join(name for name, _ in module.named_modules() if name)
        raise ProbeError(
            f"feature_layer={name!r} is no submodule of {type(module).__name__}; it has {names}."
        ) from error


def _is_features(output: Any) -> bool:
    return isinstance(output, Tensor) and output.ndim in (2, 4)


def _pooled(output: Any, name: str) -> Tensor:
    if not _is_features(output):
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ProbeError(
            f"feature_layer={name!r} gives {what}; expected features (N, D), or maps (N, C, H, W) to take the mean of."
        )
    pooled: Tensor = output.mean((2, 3)) if output.ndim == 4 else output
    return pooled


def _gives(output: Tensor, call: LossCall) -> bool:
    """Whether the loss got this output: as it is, or as probabilities or log-probabilities."""
    logits = call.logits.detach()
    if output.numel() != logits.numel() or output.device != logits.device:
        return False
    z = output.detach().float().reshape(logits.shape)
    if call.kind == "binary_cross_entropy":
        z = z.sigmoid()
    elif call.kind in ("nll_loss", "kl_div"):
        z = z.log_softmax(1)
    # As near as the type allows: a head that begins at zero must not be taken for another one.
    near = max(1e-5, 4 * torch.finfo(logits.dtype).eps)
    return torch.allclose(z, logits.float(), rtol=near, atol=near / 10, equal_nan=True)
