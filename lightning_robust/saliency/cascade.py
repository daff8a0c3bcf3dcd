"""Whether maps take notice when a net loses its weights, layer by layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_robust.saliency.drift import drift
from lightning_robust.saliency.permutation import parameters_permuted, refuse_sharded
from lightning_robust.saliency.sanity import Explain, insensitive, maps_of, means, with_noise

__all__ = ["Cascade", "CascadeStep", "cascading_randomisation"]


@dataclass(frozen=True)
class CascadeStep:
    """One step of a cascade.

    Attributes:
        layers: The submodules whose own parameters were permuted in this step, in addition to those before.
        similarity: Of the maps to those of the intact net: means over samples of what
            :func:`~lightning_robust.saliency.drift` measures.
    """

    layers: tuple[str, ...]
    similarity: dict[str, float]


@dataclass(frozen=True)
class Cascade:
    """What becomes of maps while a net loses its weights, layer by layer. Prints as a Markdown table.

    Attributes:
        steps: From the output layer down; after the last one all weights are permuted.
        floor: The similarity that noise on the inputs leaves, see
            :func:`~lightning_robust.saliency.sanity.noise_floor`.
        samples: How many samples that is about: those whose map by the intact net is not constant (Grad-CAM is 0
            throughout for some). Without any, all numbers are NaN.
        insensitive: Whether maps of a net without any of its weights still resemble those of the intact one, see
            :func:`~lightning_robust.saliency.sanity.insensitive`. Such maps show the input, not the model.
    """

    steps: tuple[CascadeStep, ...]
    floor: dict[str, float]
    samples: int
    insensitive: bool

    def __str__(self) -> str:
        names = list(self.floor)
        rows = [
            f"| permuted, from the output down ({self.samples} samples) | " + " | ".join(names) + " |",
            "|---|" + "---:|" * len(names),
            *(_row(("+ " if i else "") + ", ".join(step.layers), step.similarity) for i, step in enumerate(self.steps)),
            _row("none (noise on the inputs)", self.floor),
        ]
        return "\n".join([*rows, "", self._verdict()])

    def _verdict(self) -> str:
        if self.insensitive:
            return (
                "**insensitive**: maps of a net without its weights look like those of the net itself. They show the "
                "input, not the model; use another method."
            )
        if not self.samples:
            return "unknown: the maps of the intact net are constant, for every sample."
        return "fine: maps change with the weights."


def cascading_randomisation(
    module: nn.Module,
    explain: Explain,
    x: Tensor,
    *,
    seed: int = 0,
    noise: float = 0.02,
    spread: float | Tensor | None = None,
    stages: int | None = None,
) -> Cascade:
    """Take a net its weights, from the output layer down to the input, and see whether its maps take notice.

    Layers come in the reverse of the order in which they run; one that is not called itself (its weights are used by
    another module) has the place after the module that was registered before it. Everything is put back.

    A healthy method declines step by step. One that falls at once depends on the last layers alone (Grad-CAM), one that
    stays up is called out as insensitive. A layer whose entries are all equal (a fresh BatchNorm) changes nothing.

    Args:
        module: As for :func:`~lightning_robust.saliency.sanity.null_similarity`; whatever ``explain``
            explains, or a part of it.
        explain: As for :func:`~lightning_robust.saliency.sanity.null_similarity`. It is called once for each step
            and three times more.
        x: As for :func:`~lightning_robust.saliency.sanity.null_similarity`.
        seed: Of permutations and noise.
        noise: As for :func:`~lightning_robust.saliency.sanity.with_noise`.
        spread: As for :func:`~lightning_robust.saliency.sanity.with_noise`.
        stages: At most so many steps, with as many layers in each; ``None`` for one step a layer.

    Raises:
        ValueError: If the module has no parameters, or ``stages`` is below 1.
        RuntimeError: As :func:`~lightning_robust.saliency.permutation.permuted`.

    Example:
        >>> import torch
        >>> from lightning_robust.saliency import gradient
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
        >>> x, target = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        >>> [step.layers for step in cascading_randomisation(net, lambda x: gradient(net, x, target), x).steps]
        [('3',), ('1',)]
        >>> cascading_randomisation(net, lambda x: x[:, 0] - x[:, 0].mean(), x).insensitive
        True

    References:
        Adebayo et al., `Sanity Checks for Saliency Maps <https://arxiv.org/abs/1810.03292>`_, 2018, section 3.1. They
        draw new weights; these are permuted.
    """
    if stages is not None and stages < 1:
        raise ValueError(f"cascading_randomisation(stages=) must be at least 1, or None for all layers; got {stages}.")
    owned = _owned(module)
    if not owned:
        raise ValueError(f"{type(module).__name__} has no parameters that could be permuted.")
    refuse_sharded(module, dict(module.named_parameters()))
    maps = maps_of(module, explain, x)
    # Grad-CAM is 0 throughout for many samples. Two empty maps are alike, which says nothing about the method.
    telling = (maps.flatten(1).amax(1) != maps.flatten(1).amin(1)).cpu()

    def similarity(inputs: Tensor) -> dict[str, float]:
        return means({k: v[telling] for k, v in drift(maps_of(module, explain, inputs), maps).items()})

    floor = similarity(with_noise(x, noise=noise, spread=spread, seed=seed))
    order = _from_output_down(module, owned, lambda: maps_of(module, explain, x))
    steps = []
    with ExitStack() as stack:
        for layers in _dealt(order, stages or len(order)):
            held = {key: p for layer in layers for key, p in owned[layer].items()}
            stack.enter_context(parameters_permuted(held, seed))
            steps.append(CascadeStep(tuple(layers), similarity(x)))
    return Cascade(tuple(steps), floor, int(telling.sum()), insensitive(steps[-1].similarity, floor))


def _row(name: str, values: Mapping[str, float]) -> str:
    return f"| {name} | " + " | ".join(f"{value:.2f}" for value in values.values()) + " |"


def _owned(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The parameters that each submodule holds itself, in order of registration; shared ones where they come first."""
    owned: dict[str, dict[str, Tensor]] = {}
    for name, parameter in module.named_parameters():
        owned.setdefault(name.rpartition(".")[0], {})[name] = parameter
    return owned


def _from_output_down(module: nn.Module, owned: Iterable[str], run: Callable[[], object]) -> list[str]:
    started: dict[str, int] = {}

    def watcher(name: str) -> Callable[[nn.Module, Any], None]:
        def watch(_: nn.Module, __: Any) -> None:
            # When it began, not when it ended: the position embedding of a transformer belongs to its input.
            started.setdefault(name, len(started))

        return watch

    hooks = [part.register_forward_pre_hook(watcher(name)) for name, part in module.named_modules()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    places: dict[str, tuple[int, int]] = {}
    last = -1
    for number, (name, _) in enumerate(module.named_modules()):
        last = started.get(name, last)
        places[name] = (last, number)
    return sorted(owned, key=places.__getitem__, reverse=True)


def _dealt(order: Sequence[str], stages: int) -> Iterator[Sequence[str]]:
    """Groups of neighbours, as many as there are stages, as even as can be."""
    stages = min(stages, len(order))
    ends = [round(len(order) * i / stages) for i in range(stages + 1)]
    return (order[start:end] for start, end in itertools.pairwise(ends))
