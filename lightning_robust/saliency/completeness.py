"""Whether an attribution accounts for the prediction: its sum against what the prediction has risen by."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.protocols import LogitsFn
from lightning_robust.saliency.explaining import broadcast, explained, of_targets

__all__ = ["completeness"]

_TINY = torch.finfo(torch.float32).tiny


def completeness(
    logits_fn: LogitsFn,
    x: Tensor,
    target: Tensor,
    maps: Tensor,
    baseline: float | Tensor = 0.0,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    r"""How far the sum of a map is from the rise of the target's logit, relative to that rise.

    .. math:: \frac{\left| \sum S - (f_y(x) - f_y(x_0)) \right|}{\left| f_y(x) - f_y(x_0) \right|}

    Integrated gradients and DeepLIFT promise 0. A few per cent come from the quadrature; more says that the steps do
    not suffice, or that a rule was not applied. Read the median: a sample whose logit hardly differs from that of the
    baseline has a large relative error, whatever the method.

    Args:
        logits_fn: As for :func:`~lightning_robust.saliency.methods.gradient`.
        x: The inputs ``(N, ...)``.
        target: The classes that were explained, ``(N,)``.
        maps: Their maps ``(N, ...)``, with signs, channels summed or not.
        baseline: The one of the maps, as for :func:`~lightning_robust.saliency.methods.integrated_gradients`.
        chunk_size: Samples a forward; ``None`` for all.

    Returns:
        Relative errors ``(N,)``, at least 0, in float64 on the CPU; 0 is complete.

    Raises:
        ValueError: If there is not one map and one target for each input, or logits or ``baseline`` do not fit.

    Example:
        >>> x, target, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([1]), torch.tensor([[1.0, 3.0], [1.0, -4.0]])
        >>> completeness(lambda x: x @ weight, x, target, torch.tensor([[3.0, -7.5]]))  # in truth 3 and -8
        tensor([0.1000], dtype=torch.float64)

    References:
        Sundararajan et al., `Axiomatic Attribution for Deep Networks <https://arxiv.org/abs/1703.01365>`_, 2017,
        proposition 1.
    """
    if len(maps) != len(x):
        raise ValueError(f"expected a map for each of {len(x)} inputs, got maps {tuple(maps.shape)}.")
    rise = explained(_rise, logits_fn, x, target, chunk_size, broadcast(baseline, x)).cpu().double()
    total = maps.detach().cpu().double().flatten(1).sum(1)
    return (total - rise).abs() / rise.abs().clamp(min=_TINY)


def _rise(logits: LogitsFn, x: Tensor, target: Tensor, start: Tensor) -> Tensor:
    with torch.no_grad():
        return of_targets(logits, x, target) - of_targets(logits, start, target)
