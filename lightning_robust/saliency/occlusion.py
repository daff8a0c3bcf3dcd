"""Occlusion: what the prediction loses when a part of the input is hidden."""

from __future__ import annotations

from torch import Tensor

from lightning_robust.protocols import LogitsFn
from lightning_robust.saliency.explaining import broadcast, explained

__all__ = ["occlusion"]


def occlusion(
    logits_fn: LogitsFn,
    x: Tensor,
    target: Tensor,
    *,
    window: float = 0.25,
    baseline: float | Tensor = 0.0,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Occlusion: how much the target's logit falls when a window is replaced by the baseline.

    .. math:: S_p = \operatorname{mean}_{w \ni p} \big( f_y(x) - f_y(x \text{ without } w) \big)

    A window hides all channels at once and moves by half its side, so that neighbours overlap. Of a table it hides one
    feature at a time. No gradient is needed, so this also explains what cannot be differentiated.

    Args:
        logits_fn: As for :func:`~lightning_robust.saliency.methods.gradient`, though it need not be differentiable. It
            is called once for each place of the window: about ``(2 / window - 1)^2 + 1`` times for a picture (50 at
            0.25), once more than there are features for a table.
        x: Pictures ``(N, C, H, W)``, signals ``(N, C, L)``, or tables ``(N, D)``; not changed.
        target: The classes to explain, ``(N,)``.
        window: Side of the window as a share of the input's, in (0, 1]; rounded, at least one pixel. Tables ignore it.
        baseline: What hides: a number, or a tensor that broadcasts against ``x``.
        chunk_size: Samples a forward, for memory; ``None`` for all.

    Returns:
        Maps ``(N, ...)`` with signs, in logits: positive where the target loses by hiding. The drop is that of a whole
        window with all its channels, nothing is summed. float32, detached.

    Raises:
        ValueError: If ``x``, ``target``, the logits or ``baseline`` do not fit, or ``window`` is no share.

    Example:
        >>> import torch
        >>> x, target = torch.tensor([[1.0, 2.0]]), torch.tensor([1])
        >>> occlusion(lambda x: x @ torch.tensor([[1.0, 3.0], [1.0, -4.0]]), x, target)
        tensor([[ 3., -8.]])

    References:
        Zeiler and Fergus, `Visualizing and Understanding Convolutional Networks <https://arxiv.org/abs/1311.2901>`_,
        2014, section 4.2.
    """
    from captum.attr import Occlusion  # type: ignore[import-untyped]  # captum ships no types

    if not 0 < window <= 1:
        raise ValueError(f"occlusion(window=) is a share of the input's side, above 0 and at most 1; got {window}.")
    sides = [max(1, round(window * side)) for side in x.shape[2:]]
    strides = [max(1, side // 2) for side in sides]
    channels = list(x.shape[1:2]) if sides else [1]  # without a second dimension, the features of a table

    def attribute(logits: LogitsFn, x: Tensor, target: Tensor, start: Tensor) -> Tensor:
        maps: Tensor = Occlusion(logits).attribute(
            x.detach(), (*channels, *sides), (*channels, *strides), start, target
        )
        return maps[:, 0] if sides else maps  # the same in all channels

    return explained(attribute, logits_fn, x, target, chunk_size, broadcast(baseline, x))
