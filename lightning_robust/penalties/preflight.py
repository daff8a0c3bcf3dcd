"""A penalty tried once before training: whether gradients of it reach the parameters, and if not, what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["preflight", "way_around"]

_FINITE = "method='finite_differences'"
_OTHERS = f"another penalty (SaliencyGuided, or JacobianPenalty with {_FINITE})"
# What torch says -> what to do; {finite} is the way around second derivatives. Where several fit, the first counts.
_REMEDIES = {
    "scaled_dot_product": "This attention kernel has no second derivative. Run the step under "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or use {finite}.",
    "donated buffers": "A compiled network throws its graph away after one backward pass. Use {finite} with "
    "reuse=False, or set torch._functorch.config.donated_buffer = False before compiling.",
    "double backward": "A compiled network has no second derivative. Use {finite}, or leave the network uncompiled.",
    "use_reentrant": "Reentrant checkpointing gives no gradient of the input. Call "
    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False).",
    "": "If a layer has no second derivative, use {finite}.",
}


def way_around(penalty: Any) -> str:
    """What to use instead where a network has no second derivative: a setting of the penalty, or another penalty.

    Example:
        >>> from lightning_robust.penalties import AttributionPrior, RightReasons
        >>> way_around(RightReasons(method="double_backward"))
        "method='finite_differences'"
        >>> way_around(AttributionPrior())
        "another penalty (SaliencyGuided, or JacobianPenalty with method='finite_differences')"
    """
    fixed = is_dataclass(penalty) and hasattr(penalty, "method") and "method" not in {f.name for f in fields(penalty)}
    return _OTHERS if fixed else _FINITE


def preflight(
    compute: Callable[[], Tensor],
    parameters: Iterable[nn.Parameter],
    what: str,
    finite: str = _FINITE,
    *,
    may_vanish: bool = False,
) -> None:
    """Compute a penalty and its gradients once, so that what cannot work fails early and says why.

    Nothing is left in ``.grad``. What a forward itself moves (BatchNorm's statistics, random numbers) is moved: run it
    inside :func:`lightning_robust.frozen`.

    Args:
        compute: Makes the penalty, a scalar.
        parameters: Those that training will change; frozen ones are left out.
        what: What to call the penalty in messages.
        finite: What to use where the network has no second derivative; see :func:`way_around`.
        may_vanish: Whether a penalty of 0 is no surprise (masks without marks in this batch); else it warns where every
            gradient is exactly 0.

    Raises:
        TypeError: If the penalty is no scalar tensor.
        RuntimeError: If the penalty or its gradients cannot be computed (with a remedy where the cause is known), if no
            parameter receives a gradient, or if anything is not finite.

    Example:
        A map that captum computed is a number like any other: nothing leads from it back to the parameters.

        >>> from captum.attr import Saliency
        >>> net, x = nn.Linear(2, 3), torch.rand(4, 2).requires_grad_()
        >>> preflight(lambda: Saliency(net).attribute(x, target=0).square().mean(), net.parameters(), "my penalty")
        Traceback (most recent call last):
        RuntimeError: my penalty reaches 0 of 2 trainable parameters, so it cannot train any. ...
    """
    trainable = [p for p in parameters if p.requires_grad]
    try:
        penalty = compute()
        if not isinstance(penalty, Tensor) or penalty.numel() != 1:
            got = f"a tensor {tuple(penalty.shape)}" if isinstance(penalty, Tensor) else type(penalty).__name__
            raise TypeError(f"{what} must return a scalar tensor, got {got}: return the mean over the samples.")
        connected = penalty.requires_grad and trainable  # else autograd.grad would only say that there is no graph
        found = torch.autograd.grad(penalty, trainable, allow_unused=True) if connected else ()
    except RuntimeError as error:
        remedy = next(remedy for said, remedy in _REMEDIES.items() if said in str(error)).format(finite=finite)
        raise RuntimeError(f"{what} cannot be trained with this network. {remedy} torch says: {error}") from error
    gradients = [gradient for gradient in found if gradient is not None]
    if not gradients:
        raise RuntimeError(
            f"{what} reaches 0 of {len(trainable)} trainable parameters, so it cannot train any. Attributions from "
            "captum are not differentiable with respect to parameters, nor is what is computed under torch.no_grad() "
            "or detached; use a penalty of lightning_robust.penalties, or torch.autograd.grad(..., create_graph=True). "
            f"Where a layer has no second derivative (once_differentiable), use {finite}."
        )
    broken = sum(not bool(g.isfinite().all()) for g in gradients)
    if broken or not bool(penalty.isfinite().all()):
        raise RuntimeError(
            f"{what} is {float(penalty.detach()):g}, and {broken} of its {len(gradients)} gradients are not finite. "
            "Look for inputs that are not finite, or half precision that overflows (compute the penalty in float32)."
        )
    if not may_vanish and not any(bool(g.any()) for g in gradients):
        warnings.warn(
            f"{what} is {float(penalty.detach()):g} on the first batch, and every gradient of it is exactly 0: as long "
            "as that lasts it trains nothing. Gradients may be too small for half precision (use bf16 or fp32), or the "
            "last layer starts at 0 (then it comes to life by itself).",
            stacklevel=2,
        )
