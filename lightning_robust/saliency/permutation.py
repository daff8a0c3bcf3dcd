"""A net of the same weights that knows nothing: the entries of its parameters in a random order, for a while."""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_robust.randomness import seeded

__all__ = ["parameters_permuted", "permuted", "refuse_sharded"]

_SHARDED = {"DTensor", "FlatParameter", "FSDPModule", "FullyShardedDataParallel"}  # by name: not every torch has all


@contextmanager
def permuted(module: nn.Module, seed: int = 0, *, only: str | Sequence[str] | None = None) -> Iterator[None]:
    """Inside, the entries of each parameter of ``module`` are in a random order; afterwards all bits are as before.

    A net of the same weights that knows nothing: every parameter keeps its distribution, so that activations keep
    their scale, and no module of a stranger has to be initialised anew. What has no order stays as it is: parameters
    whose entries are all equal (weights and biases of a fresh BatchNorm, biases that start at 0) and single numbers.
    Buffers stay too, running statistics among them.

    The order is a function of the seed and the parameter's name. A parameter that several modules share is permuted
    once, and for all of them. Values are written in place and past autograd, so that whatever refers to the parameters
    (optimizers, compiled code, pending graphs) goes on as if nothing had happened. They are put back also when an
    exception flies.

    Args:
        module: Any module.
        seed: Of the permutations.
        only: Names of submodules (``module.named_modules()``) whose parameters are permuted, with all they contain;
            ``None`` for all, ``""`` is the module itself.

    Raises:
        ValueError: If there is no submodule of a name in ``only``.
        RuntimeError: If parameters are sharded over several processes, or not yet initialised.

    Example:
        >>> layer = nn.Linear(3, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
        >>> with permuted(layer):
        ...     print(layer.weight.data)
        tensor([[3., 1., 2.]])
        >>> layer.weight.data
        tensor([[1., 2., 3.]])
    """
    parameters = dict(module.named_parameters())
    if only is not None:
        names = [only] if isinstance(only, str) else only
        wanted = {id(p) for name in names for p in _part(module, name).parameters()}
        parameters = {name: p for name, p in parameters.items() if id(p) in wanted}
    refuse_sharded(module, parameters)
    with parameters_permuted(parameters, seed):
        yield


@contextmanager
def parameters_permuted(parameters: Mapping[str, Tensor], seed: int) -> Iterator[None]:
    """What :func:`permuted` does, for parameters by name that are known to be whole (:func:`refuse_sharded`)."""
    # All copies before the first write: parameters that are no one object may still share memory.
    before = [(parameter, parameter.detach().clone()) for parameter in parameters.values()]
    try:
        for name, (parameter, values) in zip(parameters, before, strict=True):
            order = torch.randperm(values.numel(), generator=seeded(seed, zlib.crc32(name.encode())))
            _write(parameter, values.flatten()[order.to(values.device)].view(values.shape))
        yield
    finally:
        for parameter, values in before:
            _write(parameter, values)


def _write(parameter: Tensor, values: Tensor) -> None:
    inference = parameter.is_inference()
    with torch.inference_mode(inference), torch.no_grad():
        # Through `.data`, which counts no version: graphs that saved the parameter stay valid, as its values come back.
        (parameter if inference else parameter.data).copy_(values)


def _part(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        known = [other for other, _ in module.named_modules() if other]
        near = difflib.get_close_matches(name, known, 3, cutoff=0.3)
        raise ValueError(
            f"permuted(only=) names submodules, and {type(module).__name__} has none named {name!r}."
            + (f" Did you mean {' or '.join(map(repr, near))}?" if near else f" It has {', '.join(known) or 'none'}.")
        ) from error


def refuse_sharded(module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Whether the entries of these parameters of ``module`` can be permuted in place.

    Raises:
        RuntimeError: If not: they are sharded over several processes, or not yet initialised.
    """
    for name, parameter in parameters.items():
        if is_lazy(parameter):
            raise RuntimeError(f"the parameter {name!r} has no values yet. Run the module on one batch before.")
    for name, held in (*parameters.items(), *module.named_modules()):
        found = _SHARDED & {kind.__name__ for kind in type(held).__mro__}
        if found:
            raise RuntimeError(
                f"{name or 'the module'} of {type(module).__name__} lies in pieces on several processes "
                f"({', '.join(sorted(found))}), and its entries cannot be permuted in place. Leave the comparison with "
                f"permuted weights out of this run, or load a checkpoint in one process and make it there."
            )
