"""What a prediction depends on: attribution maps of one logit, computed by captum.

The maps cannot be trained through: captum leaves no path back to the parameters. Penalties have their own gradients.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.modes import gradients
from lightning_robust.protocols import LogitsFn

__all__ = ["METHODS", "gradcam", "gradient", "integrated_gradients", "method_named"]

# Bilinear or its like, by the number of dimensions of the input.
_ENLARGE = {3: "linear", 4: "bilinear", 5: "trilinear"}


def gradient(logits_fn: LogitsFn, x: Tensor, target: Tensor) -> Tensor:
    r"""Plain gradients: how much the target's logit moves with each input, whichever the direction.

    .. math:: S = \sum_c \left| \partial f_y / \partial x_c \right|

    Args:
        logits_fn: Inputs ``(M, ...)`` of any batch size to logits ``(M, K)``, differentiable. One yes/no logit per
            sample, ``(M,)`` or ``(M, 1)``, counts as two classes: class 1 is the logit, class 0 its negative.
        x: Inputs ``(N, C, ...)`` or ``(N, D)``; not changed. Works under ``no_grad`` and in inference mode.
        target: The classes to explain, ``(N,)``. Keep them fixed over time: explaining the argmax makes every change
            of class look like a change of attention.

    Returns:
        Maps ``(N, ...)``, at least 0, the channels summed; ``(N, D)`` for inputs without channels. float32, detached.

    Raises:
        ValueError: If ``x`` has no batch dimension or is not floating point, or there is not one target per sample.

    Example:
        >>> x, target = torch.tensor([[1.0, 2.0]]), torch.tensor([1])
        >>> gradient(lambda x: x @ torch.tensor([[1.0, 3.0], [1.0, -4.0]]), x, target)
        tensor([[3., 4.]])

    References:
        Simonyan et al., `Deep Inside Convolutional Networks <https://arxiv.org/abs/1312.6034>`_, 2013, section 3.
        They take the largest of the channels; the sum is what Adebayo et al. compare over training.
    """
    from captum.attr import Saliency  # type: ignore[import-untyped]  # captum ships no types

    _check(x, target)
    with gradients(x, target) as (x, target):
        maps = Saliency(_two_classes(logits_fn)).attribute(x.requires_grad_(), target)
        return _without_channels(maps)


def integrated_gradients(
    logits_fn: LogitsFn,
    x: Tensor,
    target: Tensor,
    *,
    steps: int = 16,
    baseline: float | Tensor = 0.0,
    method: str = "riemann_middle",
) -> Tensor:
    r"""Integrated gradients: what each input adds to the target's logit on the way from the baseline to ``x``.

    .. math:: S = (x - x_0) \cdot \int_0^1 \nabla f_y(x_0 + a (x - x_0)) \, da

    Complete: the map of a sample sums to ``f(x) - f(baseline)``, up to the error of the quadrature. With 16 midpoints
    that is about 1 % on small ReLU nets, what Gauss-Legendre needs 32 points for.

    Args:
        logits_fn: As for :func:`gradient`. It is called ``steps`` times with batches of N, so that memory stays that
            of one batch.
        x: As for :func:`gradient`.
        target: As for :func:`gradient`.
        steps: Points of the quadrature, at least 1.
        baseline: Where the path starts: a number, or a tensor that broadcasts against ``x`` (for normalised inputs,
            black is ``-mean / std``).
        method: captum's name of the quadrature: ``riemann_middle``, ``riemann_trapezoid``, ``gausslegendre``, ...

    Returns:
        Maps as for :func:`gradient`, with signs: positive speaks for the target, negative against it.

    Raises:
        ValueError: As for :func:`gradient`, and if ``steps`` is below 1.

    Example:
        >>> x, target = torch.tensor([[1.0, 2.0]]), torch.tensor([1])
        >>> integrated_gradients(lambda x: x @ torch.tensor([[1.0, 3.0], [1.0, -4.0]]), x, target)
        tensor([[ 3., -8.]])

    References:
        Sundararajan et al., `Axiomatic Attribution for Deep Networks <https://arxiv.org/abs/1703.01365>`_, 2017,
        equation 1.
    """
    from captum.attr import IntegratedGradients

    _check(x, target)
    if steps < 1:
        raise ValueError(f"integrated_gradients(steps=) must be at least 1, got {steps}.")
    with gradients(x, target) as (x, target):
        start = torch.as_tensor(baseline, dtype=x.dtype, device=x.device).expand_as(x)
        maps = IntegratedGradients(_two_classes(logits_fn)).attribute(
            x, start, target, n_steps=steps, method=method, internal_batch_size=len(x)
        )
        return _without_channels(maps)


def gradcam(logits_fn: LogitsFn, x: Tensor, target: Tensor, layer: nn.Module) -> Tensor:
    r"""Grad-CAM: where the feature maps are that raise the target's logit, enlarged to the size of the input.

    .. math:: S = \mathrm{ReLU}\Big(\sum_k A_k \cdot \tfrac{1}{Z} \sum_{ij} \partial f_y / \partial A_{k,ij}\Big)

    Args:
        logits_fn: As for :func:`gradient`.
        x: As for :func:`gradient`, with at least one dimension besides batch and channels.
        target: As for :func:`gradient`.
        layer: The module whose output ``(M, K, ...)`` is looked at, usually the last feature map before pooling;
            :func:`~lightning_robust.saliency.last_feature_map` finds it.

    Returns:
        Maps as for :func:`gradient`, at least 0; enlarged linearly, so a coarse layer gives a smooth map.

    Raises:
        ValueError: As for :func:`gradient`, and if the layer's output has other dimensions than ``(M, K, ...)`` like
            the input (tokens of a transformer, flattened features).

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
    from captum.attr import LayerGradCam

    _check(x, target)
    with gradients(x, target) as (x, target):
        # The input needs gradients as well: with frozen parameters nothing else would have any.
        maps = LayerGradCam(_two_classes(logits_fn), layer).attribute(
            x.requires_grad_(), target, relu_attributions=True
        )
        if x.ndim not in _ENLARGE or not isinstance(maps, Tensor) or maps.ndim != x.ndim or not maps[0].numel():
            raise ValueError(
                f"Grad-CAM needs a layer whose output is (M, K, ...) like the input {tuple(x.shape)}; that of "
                f"{type(layer).__name__} gives maps {tuple(getattr(maps, 'shape', ()))}. Name a convolution or a block "
                f"of them, or use another method."
            )
        size = list(x.shape[2:])
        return _without_channels(F.interpolate(maps.float(), size, mode=_ENLARGE[x.ndim], align_corners=False))


METHODS: dict[str, Callable[..., Tensor]] = {
    "gradient": gradient,
    "integrated_gradients": integrated_gradients,
    "gradcam": gradcam,
}
"""The methods by name; all start ``(logits_fn, x, target)``, ``gradcam`` takes a ``layer`` as well."""


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


def _check(x: Tensor, target: Tensor) -> None:
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(
            f"expected floating point inputs (N, ...), got {x.dtype} {tuple(x.shape)}. Nothing can be differentiated "
            f"with respect to integers; explain what they are embedded to."
        )
    if target.shape != x.shape[:1]:
        raise ValueError(f"expected one target class per sample, ({len(x)},), got {tuple(target.shape)}.")


def _two_classes(logits_fn: LogitsFn) -> LogitsFn:
    """Logits with a class dimension, also where a model says only yes or no."""

    def logits(x: Tensor) -> Tensor:
        z = logits_fn(x)
        if z.ndim > 1 and z.shape[1] > 1:
            return z
        yes = z.reshape(-1, 1)
        return torch.cat([-yes, yes], dim=1)

    return logits


def _without_channels(maps: Tensor) -> Tensor:
    return (maps.sum(1) if maps.ndim > 2 else maps).detach().float()
