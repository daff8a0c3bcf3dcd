"""Finding things out on the first batch: which leaf is the input, and where the logits of a hand-written loss are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_robust.attach.batches import Path, copied, described, get, leaves, rebuilt, shown
from lightning_robust.attach.route import Route, outputs_into, producer_of
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import Followed, NoLossError, ProbeError
from lightning_robust.losses import LossCall
from lightning_robust.randomness import RandomState

__all__ = ["Read", "counted_by", "floats_of", "input_of", "may_have_input", "no_input", "tracked"]

Call = Callable[[Step, Route, Followed], LossCall]
"""Runs a step up to its logits: :meth:`lightning_robust.attach.probe.Probe.call`."""


@dataclass(frozen=True)
class Read:
    """One read of a step in which some leaves of the batch were followed.

    Attributes:
        call: The loss call.
        inputs: The followed leaves, as leaves of the graph.
        outputs: What every submodule returned.
        fed: The batch that the step got.
        followed: Leaves of that batch, and what casts and views made of them.
    """

    call: LossCall
    inputs: Mapping[Path, Tensor]
    outputs: dict[str, list[Tensor]]
    fed: Any
    followed: Followed

    def reaching(self) -> dict[Path, bool]:
        """The leaves that the logits depend on, and whether their gradient is anything but zero.

        Soft labels are floats too: what the target depends on is no input.
        """
        from_target = self._reached(self.call.target, retain=True)
        return {p: live for p, live in self._reached(self.call.logits, retain=False).items() if p not in from_target}

    def _reached(self, value: Tensor, retain: bool) -> dict[Path, bool]:
        if not value.requires_grad or not self.inputs:
            return {}
        # Not the sum: that of probabilities is constant, and has no gradient.
        weights = torch.arange(value.numel(), device=value.device, dtype=torch.float32).cos().view(value.shape)
        # Kept only where it is needed again: compiled backward passes refuse to be kept.
        grads = torch.autograd.grad(
            value, list(self.inputs.values()), weights.to(value.dtype), allow_unused=True, retain_graph=retain
        )
        return {p: bool(grad.any()) for p, grad in zip(self.inputs, grads, strict=True) if grad is not None}

    @property
    def constant(self) -> bool:
        """Whether the logits are the same for all samples (a head that was initialised with zeros)."""
        z = self.call.logits
        return z.ndim == 0 or bool((z == z[:1]).all())


def floats_of(batch: Any) -> dict[Path, Tensor]:
    """Leaves that can be differentiated by."""
    return {path: leaf for path, leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.is_floating_point()}


def may_have_input(batch: Any) -> bool:
    """Whether there is a leaf that might be differentiated by."""
    return bool(floats_of(batch) or _pictures(batch))


def tracked(call: Call, step: Step, wanted: Mapping[Path, Tensor], state: RandomState, graph: bool) -> Read:
    """Read a step, inside of ``quiet``, with some leaves of its batch as leaves of the graph.

    Raises:
        ProbeError: If the step calls no loss; where a hand-written one may have its logits is in the message.
    """
    batch = step.batch
    inputs = {path: _as_float(leaf).detach().clone().requires_grad_() for path, leaf in wanted.items()}
    # Clones of the leaves: a step may normalise its batch in place, which leaves of a graph forbid.
    fed = rebuilt(batch, {path: leaf.clone() for path, leaf in inputs.items()}, copied)
    state.restore()
    followed = {id(leaf): (path, leaf) for path, leaf in leaves(fed) if isinstance(leaf, Tensor) and path}
    outputs: dict[str, list[Tensor]] = {}
    with torch.set_grad_enabled(graph):
        try:
            with outputs_into(outputs, step.module):
                found = call(step.with_batch(fed), Route(step.name, (), None, ""), followed)
        except NoLossError as error:
            if error.candidate is None:
                raise
            guess = LossCall("cross_entropy", error.candidate, torch.empty(0))
            reached = list(Read(guess, inputs, outputs, fed, followed).reaching())
            raise ProbeError(f"{error}{_proposal(error.candidate, outputs, batch, reached)}") from None
    return Read(found, inputs, outputs, fed, followed)


def input_of(
    call: Call, read: Read, step: Step, state: RandomState, named: tuple[Path, ...] | None
) -> tuple[tuple[Path, ...], bool]:
    """Where the input is, and whether it is integers that a float copy can stand for.

    Args:
        call: Runs the step up to its logits.
        read: The read of the step with its floats tracked.
        step: The step.
        state: Random state that both reads start from.
        named: What the user named.

    Raises:
        ProbeError: With what was found, and the argument that settles it.
    """
    batch, where = step.batch, f"{type(step.module).__name__}.{step.name}"
    if named is None or not _integers(batch, named):
        paths = _chosen(read.reaching(), named, read, where)
        if paths:
            return paths, False
    refused = ""
    for trial in [named] if named is not None else [(path,) for path in _pictures(batch)]:
        try:
            other = tracked(call, step, {path: get(batch, path) for path in trial}, state, True)
        except Exception as error:  # of any kind: what a step does with floats in the place of integers
            refused = f" With floats there it says: {type(error).__name__}: {error}"
            continue
        # A step that scales bytes, and not floats, would be attacked on other pictures than it trains on.
        if torch.equal(other.call.logits.detach(), read.call.logits.detach()):
            paths = _chosen(other.reaching(), named, other, where)
            if paths:
                return paths, True
    if named is not None:
        raise ProbeError(
            f"input_key names integers, {' and '.join(map(shown, named))}, but {where} does not take floats in their "
            "place, or does something else with them. Token ids cannot be perturbed; cast integer pictures to float "
            f"in the data pipeline.{refused}"
        )
    raise no_input(batch, where, refused)


def counted_by(call: LossCall, batch: Any) -> Path:
    """A leaf to count samples by, where no input is known.

    Raises:
        ProbeError: If the batch has no tensor with rows.
    """
    tensors = [(path, leaf) for path, leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    n = len(call.logits) if call.logits.ndim else 1
    # As many as the loss gets; or fewer, where each sample gives it several rows (tokens), or some (masked ones).
    rows = [path for path, leaf in tensors if len(leaf) == n]
    rows += [path for path, leaf in tensors if len(leaf) > 1 and n % len(leaf) == 0]
    rows += [path for path, _ in tensors]
    if not rows:
        raise ProbeError(f"the batch has no tensor to count samples by: {described(batch)}.")
    return rows[0]


def _as_float(leaf: Tensor) -> Tensor:
    return leaf if leaf.is_floating_point() else leaf.to(torch.get_default_dtype())


def _integers(batch: Any, paths: Sequence[Path]) -> bool:
    """Whether one of the leaves is of integers."""
    found = [get(batch, path) for path in paths]
    return any(isinstance(leaf, Tensor) and _integer(leaf) for leaf in found)


def _pictures(batch: Any) -> list[Path]:
    """Leaves of integers that may be pictures: bytes, or four dimensions. Token ids, masks and labels have fewer."""
    return [
        path
        for path, leaf in leaves(batch)
        if isinstance(leaf, Tensor)
        and _integer(leaf)
        and (leaf.ndim > 3 or (leaf.dtype == torch.uint8 and leaf.ndim > 1))
    ]


def _integer(leaf: Tensor) -> bool:
    return not (leaf.is_floating_point() or leaf.is_complex() or leaf.dtype == torch.bool)


def _chosen(found: Mapping[Path, bool], named: Sequence[Path] | None, read: Read, where: str) -> tuple[Path, ...]:
    """The input among the leaves that the logits depend on; none where there is none.

    Raises:
        ProbeError: If there are several, a named one is not among them, or no gradient is anything but zero.
    """
    if named is not None:
        missing = [path for path in named if path not in found]
        if missing:
            others = ", ".join(map(shown, found))
            raise ProbeError(
                f"the logits of {where} do not depend on {' and '.join(map(shown, missing))} (input_key=)"
                f"{', but on ' + others if others else ''}. The batch has {described(read.fed)}."
            )
        paths = tuple(named)
    else:
        # Two domains go through one network side by side: of the other one nothing arrives in these logits.
        paths = tuple(path for path, live in found.items() if live) or tuple(found)
    if paths and not any(found[path] for path in paths) and not read.constant:
        raise ProbeError(
            f"the gradient of the logits of {where} with respect to {' and '.join(map(shown, paths))} is exactly zero "
            f"for all {len(get(read.fed, paths[0]))} samples, though their logits differ: the step rounds or quantises "
            "its input, or its units are saturated. No attack through gradients can move anything there; let the "
            "gradient through (x + (x.round() - x).detach()), or name another input with input_key=."
        )
    if named is None and len(paths) > 1:
        keys = [path[0] if len(path) == 1 else path for path in paths]
        raise ProbeError(
            f"the logits of {where} depend on several inputs: {', '.join(map(shown, paths))}. Say which one to "
            f"perturb, e.g. input_key={keys[0]!r}, or perturb all of them: input_key={keys!r}."
        )
    return paths


def _proposal(candidate: Tensor | None, outputs: dict[str, list[Tensor]], batch: Any, found: Sequence[Path]) -> str:
    """A ``logits_fn=`` that may read a hand-written loss: what was last squashed, if a submodule returned it."""
    if candidate is None or len(found) != 1:
        return ""
    name = producer_of(candidate, outputs)
    if name is None:
        return ""
    owner = "module" if not name else f"module.{name}"
    if any(part.isdigit() for part in name.split(".")):
        owner = f"module.get_submodule({name!r})"
    n = len(candidate) if candidate.ndim else 1
    labels = [
        path
        for path, leaf in leaves(batch)
        if isinstance(leaf, Tensor) and path not in found and leaf.ndim and len(leaf) == n
    ]
    key = repr(labels[0][0] if len(labels[0]) == 1 else labels[0]) if len(labels) == 1 else "..."
    expression = f"{owner}({_expression(batch, found[0])})"
    return f" They may be what {expression} returns: logits_fn=lambda module, batch: {expression}, target_key={key}."


def _expression(batch: Any, path: Path) -> str:
    """A path as code: indices and keys in brackets, attributes behind a dot."""
    text, node = "batch", batch
    for name in path:
        plain = isinstance(node, Mapping) or (isinstance(node, (list, tuple)) and not hasattr(node, "_fields"))
        text += f"[{name!r}]" if plain else f".{name}"
        node = get(node, (name,))
    return text


def no_input(batch: Any, where: str, refused: str = "") -> ProbeError:
    """The error for logits that no leaf can be differentiated from."""
    if not floats_of(batch):
        return ProbeError(
            f"the batch of {where} has no floating-point input to differentiate: {described(batch)}. Token ids cannot "
            "be perturbed. Integer pictures are perturbed where the step takes floats in their place and gives the "
            f"same logits; else cast them to float in the data pipeline.{refused}"
        )
    return ProbeError(
        f"no gradient reaches a floating-point input of {where}: {described(batch)}. Is the network (a frozen "
        f"backbone?) run under torch.no_grad(), or are its features detached? Then no attack through "
        f"gradients exists. If another loss of the step is meant, say which: loss_index=1."
    )
