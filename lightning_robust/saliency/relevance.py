"""DeepLIFT and layer-wise relevance propagation: captum's, held to what they promise.

Both replace the backward pass of the modules that they know, by type, and take the plain gradient elsewhere without a
word. So the result is checked, and refused with the cause where it does not add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AvgPoolNd, _MaxPoolNd

from lightning_robust.protocols import LogitsFn
from lightning_robust.saliency.anatomy import Anatomy, anatomy_of
from lightning_robust.saliency.completeness import completeness
from lightning_robust.saliency.explaining import broadcast, check_inputs, explained, without_channels
from lightning_robust.saliency.foreign import StandIn, lent

__all__ = ["deep_lift", "lrp"]

# Linear in their input, the chosen maxima and running statistics given: the epsilon rule fits, subclasses as well.
_LINEAR = (*(nn.Linear, _ConvNd, _BatchNorm, _MaxPoolNd, _AvgPoolNd, _AdaptiveAvgPoolNd),)
# They hand on what they get, at most in another shape.
_SHAPES = (nn.Flatten, nn.Unflatten, nn.Identity, _DropoutNd)
# Non-linearities that captum's two methods know, by exact type.
_PASSED_ON = (nn.ReLU, nn.Tanh)
_RESCALED = (nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus)
_INSTEAD = "Use 'integrated_gradients', 'input_x_gradient' or 'smoothgrad', which need nothing but gradients."


def deep_lift(
    logits_fn: LogitsFn,
    x: Tensor,
    target: Tensor,
    *,
    module: nn.Module,
    baseline: float | Tensor = 0.0,
    tolerance: float = 0.05,
    chunk_size: int | None = None,
) -> Tensor:
    r"""DeepLIFT, rescale rule: what each input adds to the target's logit in comparison with the baseline.

    Like integrated gradients in one backward pass: the slope of each non-linearity is that of the line from the
    baseline's activation to the sample's. Complete, :math:`\sum S = f_y(x) - f_y(x_0)`; this is checked.

    captum knows ReLU, ELU, LeakyReLU, Sigmoid, Tanh, Softplus and MaxPool *modules*, of exactly these types and each
    used once. Functions (``F.relu``), GELU, SiLU, LayerNorm and attention get their plain gradient instead.

    Args:
        logits_fn: As for :func:`~lightning_robust.saliency.methods.gradient`. It gets twice as many inputs as there are
            samples in a chunk, as the baselines run beside them.
        x: As for :func:`~lightning_robust.saliency.methods.gradient`.
        target: As for :func:`~lightning_robust.saliency.methods.gradient`.
        module: What ``logits_fn`` runs; hooked for the time being.
        baseline: What inputs are compared with: a number, or a tensor that broadcasts against ``x``.
        tolerance: Largest median, over the samples, of the relative completeness error.
        chunk_size: Samples a forward, baselines included, for memory; ``None`` for all.

    Returns:
        Maps as for :func:`~lightning_robust.saliency.methods.integrated_gradients`, with signs.

    Raises:
        ValueError: If ``x``, ``target``, the logits or ``baseline`` do not fit, captum cannot follow the module, or the
            median error is above ``tolerance``, with its size and what the module does that has no rule.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, 1.0], [3.0, -1.0]]))
        >>> deep_lift(net, torch.tensor([[1.0, 2.0]]), torch.tensor([1]), module=net)
        tensor([[ 3., -2.]])

    References:
        Shrikumar et al., `Learning Important Features Through Propagating Activation Differences
        <https://arxiv.org/abs/1704.02685>`_, 2017, section 3.5.1; Ancona et al., `Towards Better Understanding of
        Gradient-based Attribution Methods <https://arxiv.org/abs/1711.06104>`_, 2018.
    """
    from captum.attr import DeepLift  # type: ignore[import-untyped]  # captum ships no types

    def attribute(logits: LogitsFn, x: Tensor, target: Tensor, start: Tensor) -> Tensor:
        return without_channels(DeepLift(StandIn(logits, [module])).attribute(x, start, target))

    check_inputs(x, target, chunk_size)
    pairs = None if chunk_size is None else max(1, chunk_size // 2)
    with lent("DeepLift", module, instead=_INSTEAD), _distinct_inputs(module):
        maps = explained(attribute, logits_fn, x, target, pairs, broadcast(baseline, x))
    error = float(completeness(logits_fn, x, target, maps, baseline, chunk_size=chunk_size).quantile(0.5))
    if not error <= tolerance:
        anatomy = anatomy_of(module, logits_fn, x)
        raise ValueError(
            f"DeepLIFT does not add up on {type(module).__name__}: the sum of a map misses f(x) - f(baseline) by "
            f"{error:.0%} (median; tolerance={tolerance:g}). {anatomy.suspects(_known(anatomy, _RESCALED))} {_INSTEAD}"
        )
    return maps


def lrp(
    logits_fn: LogitsFn,
    x: Tensor,
    target: Tensor,
    *,
    module: nn.Module,
    epsilon: float = 1e-9,
    tolerance: float = 0.05,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Layer-wise relevance propagation: the target's logit, handed back from layer to layer in proportion.

    .. math:: R_i = \sum_j \frac{a_i w_{ij}}{z_j + \epsilon \operatorname{sign} z_j} R_j

    The epsilon rule in every linear layer; non-linearities pass on what they get. With a tiny ``epsilon``, on networks
    of ReLU and max pooling, this is :func:`~lightning_robust.saliency.methods.input_x_gradient` exactly. Other rules
    can be set the way of captum, as an attribute ``rule`` of a layer.

    Relevance is conserved except for what biases and ``epsilon`` take, layer by layer: a map sums to the logit only
    without biases. Checked is that none is lost *between* layers.

    Works on sequences of linear layers (also convolution, BatchNorm in eval mode, pooling, Flatten) and ReLU, Tanh and
    Dropout, written as modules, each linear one used once. Functions that compute outside of modules (``F.relu``,
    residual sums, normalisation in the step) and other modules (GELU, LayerNorm, attention) are refused.

    Args:
        logits_fn: As for :func:`~lightning_robust.saliency.methods.gradient`; it is called twice a chunk.
        x: As for :func:`~lightning_robust.saliency.methods.gradient`.
        target: As for :func:`~lightning_robust.saliency.methods.gradient`.
        module: What ``logits_fn`` runs; hooked for the time being.
        epsilon: Added to the magnitude of each layer's outputs; takes relevance from small ones.
        tolerance: Largest median, over the samples, of the share of the logit that is lost between layers.
        chunk_size: Samples a forward, for memory; ``None`` for all.

    Returns:
        Maps ``(N, ...)`` with signs: positive speaks for the target. float32, detached, channels summed.

    Raises:
        ValueError: If ``x``, ``target`` or the logits do not fit, or relevance cannot be handed back through the
            module, with the names of what has no rule or the share that is lost.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.ReLU())
        >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0, 1.0], [3.0, -1.0]]))
        >>> lrp(net, torch.tensor([[1.0, 2.0]]), torch.tensor([1]), module=net)
        tensor([[ 3., -2.]])

    References:
        Bach et al., `On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance Propagation
        <https://doi.org/10.1371/journal.pone.0130140>`_, 2015, equation 58.
    """
    from captum.attr import LRP
    from captum.attr._utils.lrp_rules import EpsilonRule  # type: ignore[import-untyped]  # captum ships no types

    if not epsilon > 0:
        raise ValueError(f"lrp(epsilon=) must be above 0, got {epsilon}.")
    check_inputs(x, target, chunk_size)
    lost: list[Tensor] = []
    with lent("LRP", module, instead=_INSTEAD):
        anatomy = anatomy_of(module, logits_fn, x)
        _check_for_lrp(anatomy)
        layers = [part for part in anatomy.leaves if isinstance(part, _LINEAR) or _has_rule(part)]
        own = {part: part.rule for part in layers if _has_rule(part)}

        def attribute(logits: LogitsFn, x: Tensor, target: Tensor) -> Tensor:
            for part in layers:  # captum takes them off again
                part.rule = own.get(part) or EpsilonRule(epsilon)
            rules = [part.rule for part in layers]
            # The "no" of a yes/no head is no layer of the network: hand back the logit, then change the sign.
            negative = (target == 0) & (anatomy.classes == 1)
            column = target.masked_fill(negative, 1)
            # Without those that only reshape: captum refuses them, and they often return their input itself.
            standing = StandIn(logits, [part for part in anatomy.leaves if not isinstance(part, _SHAPES)])
            maps, gap = LRP(standing).attribute(x, column, return_convergence_delta=True)
            lost.append(_share_lost(maps, gap, rules))
            return without_channels(torch.where(negative.view(-1, *[1] * (x.ndim - 1)), -maps, maps))

        maps = explained(attribute, logits_fn, x, target, chunk_size)
    error = float(torch.cat(lost).quantile(0.5))
    if not error <= tolerance:
        raise ValueError(
            f"LRP loses relevance between the layers of {type(module).__name__}: {error:.0%} of the logit (median; "
            f"tolerance={tolerance:g}). {anatomy.suspects(_known(anatomy, _PASSED_ON))} {_INSTEAD}"
        )
    return maps


def _known(anatomy: Anatomy, exact: tuple[type, ...]) -> set[nn.Module]:
    """The leaves that have a rule: linear ones, those that reshape, non-linear ones of exactly these types."""
    fine = (*_LINEAR, *_SHAPES)
    return {part for part in anatomy.leaves if isinstance(part, fine) or type(part) in exact or _has_rule(part)}


def _check_for_lrp(anatomy: Anatomy) -> None:
    known = _known(anatomy, _PASSED_ON)
    if not anatomy.leaves or anatomy.bearing or anatomy.outside or anatomy.leaves.keys() - known:
        seen = f". {anatomy.suspects(known)}" if anatomy.leaves else ", and none ran (a compiled module?)."
        raise ValueError(
            f"LRP hands relevance back through modules that are linear, nn.ReLU, nn.Tanh or nn.Dropout{seen} {_INSTEAD}"
        )
    twice = [type(part).__name__ for part, times in anatomy.leaves.items() if times > 1 and isinstance(part, _LINEAR)]
    if twice:
        raise ValueError(f"LRP needs linear modules that run once; used more often: {', '.join(twice)}. {_INSTEAD}")


def _has_rule(part: nn.Module) -> bool:
    return getattr(part, "rule", None) is not None


def _share_lost(maps: Tensor, gap: Tensor, rules: list[Any]) -> Tensor:
    """Share of each sample's logit, ``(N,)``, that neither arrived nor was taken by a layer."""
    arrived = maps.detach().cpu().double().flatten(1).sum(1)
    logit = arrived + gap.detach().cpu().double()
    taken = torch.zeros_like(logit)
    for rule in rules:
        for out in rule.relevance_output.values():
            taken += out.cpu().double().flatten(1).sum(1)
        for given in rule.relevance_input.values():
            for part in given if isinstance(given, list) else [given]:
                taken -= part.cpu().double().flatten(1).sum(1)
    # Relevances are shares of the logit while they are handed back.
    return torch.where(logit == 0, 0.0, 1 - arrived / logit - taken).abs()


@contextmanager
def _distinct_inputs(module: nn.Module) -> Iterator[None]:
    """Each leaf of the module gets a copy of its input.

    Else a max pooling behind an activation shares a tensor with it: captum's hook on the activation's output then runs
    before that on the pooling's input and sees the plain gradient, and maps do not add up.
    """
    handles = [
        part.register_forward_pre_hook(
            lambda _, inputs: tuple(t.clone() if isinstance(t, Tensor) else t for t in inputs)
        )
        for part in module.modules()
        if not any(part.children())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
