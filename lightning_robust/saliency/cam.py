"""Class activation maps: where the features are that speak for the target, in one layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.protocols import LogitsFn
from lightning_robust.saliency.explaining import explained, of_targets
from lightning_robust.saliency.grids import as_feature_map, enlarged_to

__all__ = ["gradcam", "layercam"]


def gradcam(
    logits_fn: LogitsFn, x: Tensor, target: Tensor, layer: nn.Module, *, chunk_size: int | None = None
) -> Tensor:
    r"""Grad-CAM: where the feature maps are that raise the target's logit, enlarged to the size of the input.

    .. math:: S = \mathrm{ReLU}\Big(\sum_k A_k \cdot \tfrac{1}{Z} \sum_{ij} \partial f_y / \partial A_{k,ij}\Big)

    Args:
        logits_fn: As for :func:`~lightning_robust.saliency.methods.gradient`.
        x: As for :func:`~lightning_robust.saliency.methods.gradient`, with at least one dimension besides batch and
            channels.
        target: As for :func:`~lightning_robust.saliency.methods.gradient`.
        layer: The module whose output is looked at; :func:`~lightning_robust.saliency.last_feature_map` finds it. Of
            convolutional nets usually the last feature map ``(M, K, ...)`` before pooling, also with the channels last
            ``(M, H, W, K)``. Of transformers tokens ``(M, T, K)`` or ``(T, M, K)``, laid out as the picture's grid of
            patches, class and register tokens in front left out; take them before the last attention, as behind it a
            head that reads the class token does not see the others.
        chunk_size: Samples a forward, for memory; ``None`` for all.

    Returns:
        Maps ``(N, ...)``, at least 0; enlarged linearly, so a coarse layer gives a smooth map. float32, detached.

    Raises:
        ValueError: If ``x``, ``target`` or the logits do not fit, the layer's output is no map over the input, the
            layer did not run exactly once, or the logits do not depend on its output.

    Example:
        >>> pick = nn.Conv2d(1, 1, 1, bias=False)
        >>> _ = nn.init.ones_(pick.weight)
        >>> x = torch.tensor([[[[1.0, 2.0], [0.0, 5.0]]]])
        >>> gradcam(lambda x: pick(x).sum((2, 3)).expand(-1, 2), x, torch.tensor([0]), pick)
        tensor([[[1., 2.],
                 [0., 5.]]])

    References:
        Selvaraju et al., `Grad-CAM <https://arxiv.org/abs/1610.02391>`_, 2017, equations 1 and 2.
    """

    def attribute(logits: LogitsFn, x: Tensor, target: Tensor) -> Tensor:
        values, slopes = _values_and_slopes(logits, x, target, layer)
        weights = slopes.flatten(2).mean(2).view(*slopes.shape[:2], *[1] * (slopes.ndim - 2))
        return enlarged_to((weights * values).sum(1).relu().float(), x.shape)

    return explained(attribute, logits_fn, x, target, chunk_size)


def layercam(
    logits_fn: LogitsFn, x: Tensor, target: Tensor, layer: nn.Module, *, chunk_size: int | None = None
) -> Tensor:
    r"""LayerCAM: like Grad-CAM, but each place of a feature map is weighted by its own gradient, if that is positive.

    .. math:: S = \mathrm{ReLU}\Big(\sum_k \mathrm{ReLU}(\partial f_y / \partial A_k) \odot A_k\Big)

    Finer than :func:`gradcam` in layers before the last, where one weight for a whole feature map blurs.

    Args:
        logits_fn: As for :func:`gradcam`.
        x: As for :func:`gradcam`.
        target: As for :func:`gradcam`.
        layer: As for :func:`gradcam`.
        chunk_size: As for :func:`gradcam`.

    Returns:
        Maps as for :func:`gradcam`.

    Raises:
        ValueError: As for :func:`gradcam`.

    Example:
        >>> pick = nn.Conv2d(1, 1, 1, bias=False)
        >>> _ = nn.init.ones_(pick.weight)
        >>> x, sign = torch.tensor([[[[1.0, 2.0], [0.0, 5.0]]]]), torch.tensor([[1.0, -1.0], [1.0, 1.0]])
        >>> layercam(lambda x: (pick(x) * sign).sum((2, 3)).expand(-1, 2), x, torch.tensor([0]), pick)
        tensor([[[1., 0.],
                 [0., 5.]]])

    References:
        Jiang et al., `LayerCAM: Exploring Hierarchical Class Activation Maps for Localization
        <https://doi.org/10.1109/TIP.2021.3089943>`_, 2021, equations 5 to 7.
    """

    def attribute(logits: LogitsFn, x: Tensor, target: Tensor) -> Tensor:
        values, slopes = _values_and_slopes(logits, x, target, layer)
        return enlarged_to((slopes.relu() * values).sum(1).relu().float(), x.shape)

    return explained(attribute, logits_fn, x, target, chunk_size)


def _values_and_slopes(logits: LogitsFn, x: Tensor, target: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The layer's feature map and the gradient of the targets' logits with respect to it, both ``(M, K, ...)``.

    Own code, as captum's LayerGradCam takes whatever it gets for a feature map: of tokens it averages the tokens.
    """
    # The input needs gradients as well: with frozen parameters nothing else would have any.
    output, wanted = _output(logits, x, target, layer)
    (slopes,) = torch.autograd.grad(wanted.sum(), output, allow_unused=True)
    if slopes is None:
        raise ValueError(f"the logits do not depend on what {type(layer).__name__} returns. Name another layer.")
    if _batch_is_second(logits, x, target, layer, output):
        output, slopes = output.transpose(0, 1), slopes.transpose(0, 1)
    (values, extra), (slopes_on_grid, _) = (as_feature_map(t.detach(), x, layer) for t in (output, slopes))
    if extra and bool((slopes_on_grid == 0).all()) and bool((slopes != 0).any()):
        raise ValueError(
            f"the logits depend on {type(layer).__name__}'s class token alone, not on the patches: there is nothing to "
            f"map. Name a layer before the last attention, such as the norm in front of it."
        )
    return values, slopes_on_grid


def _output(logits: LogitsFn, x: Tensor, target: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """What the layer returned in a forward pass, and the targets' logits."""
    kept: list[Any] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        first = output[0] if type(output) in (tuple, list) and output else output  # attention returns weights too
        kept.append(first)
        if not isinstance(first, Tensor):
            return output
        # What runs on is a copy, which may be changed in place.
        return first.clone() if first is output else type(output)([first.clone(), *output[1:]])

    handle = layer.register_forward_hook(keep)
    try:
        wanted = of_targets(logits, x, target)
    finally:
        handle.remove()
    if len(kept) != 1 or not isinstance(kept[0], Tensor):
        got = f"it ran {len(kept)} times" if len(kept) != 1 else f"it returned a {type(kept[0]).__name__}"
        raise ValueError(
            f"class activation maps need a layer that runs once and returns a tensor, and is not compiled; "
            f"{type(layer).__name__}: {got}. Name another layer."
        )
    return kept[0], wanted


def _batch_is_second(logits: LogitsFn, x: Tensor, target: Tensor, layer: nn.Module, output: Tensor) -> bool:
    """Whether tokens come as ``(T, M, K)``, as ``nn.TransformerEncoder`` has them by default."""
    if output.ndim != 3 or x.ndim != 4 or output.shape[1] != len(x):
        return False
    if output.shape[0] != len(x):
        return True
    # As many tokens as samples: one sample alone tells which is which.
    with torch.no_grad():
        alone, _ = _output(logits, x[:1], target[:1], layer)
    return alone.shape[1] == 1 != alone.shape[0]
