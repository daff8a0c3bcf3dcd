"""Attribution priors: what a model is told about how its explanations should look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_robust.losses import LossCall
from lightning_robust.penalties.derivatives import drawn, input_gradient, one_a_sample, replayed, right_answer
from lightning_robust.penalties.features import channels_of
from lightning_robust.penalties.squared_gradient import Method
from lightning_robust.protocols import LogitsFn
from lightning_robust.randomness import Noise, uniform

__all__ = ["AttributionPrior", "Prior", "density", "evenness", "total_variation"]

Prior = Literal["total_variation", "gini", "sparsity"]
"""Smooth maps, few features for all samples, or few features for each sample."""


@dataclass(frozen=True)
class AttributionPrior:
    r"""A penalty on the expected gradients of a model, computed on the training batch itself.

    The attribution of feature ``j`` is

    .. math:: \phi_j(x) = \mathrm{E}_{x', a}\Big[(x_j - x'_j)\,
              \frac{\partial f_y}{\partial x_j}\big(x' + a(x - x')\big)\Big]

    with another sample of the batch as background ``x'``, ``a`` uniform in [0, 1], and ``f_y`` the score of the right
    answer (the logit of the right class; :func:`~lightning_robust.penalties.derivatives.right_answer`). Colours of a
    pixel are summed. Each sample's map is divided by its mean magnitude first, so that the penalty is about its form
    alone: shrinking all gradients gains nothing, and a weight means the same for every model.

    ===================  =====================================================  =========================  ============
    prior                what is penalised                                      asks for                   range
    ===================  =====================================================  =========================  ============
    ``total_variation``  mean step between neighbours, summed over dimensions   smooth maps                from 0
    ``gini``             1 - Gini coefficient of the batch's mean magnitudes    few features altogether    [0, 1]
    ``sparsity``         ``||phi||_1 / (sqrt(D) ||phi||_2)`` of each sample     few features each time     (0, 1]
    ===================  =====================================================  =========================  ============

    It needs every layer to have a second derivative. A batch of one sample has no background and trains nothing.

    ``gini`` is about the mean magnitudes of a batch, as in the paper, so that its value depends on the batch size: the
    fewer samples, the less even their mean, and the smaller the penalty. The others are means over samples.

    Args:
        prior: One of the above.
        samples: Backgrounds drawn for each sample and step; one is enough in training. Each costs one forward and a
            backward pass through its backward pass.
        channel_dim: The dimension whose entries are one feature (the colours of a pixel), for inputs of three and more
            dimensions; None: each number is a feature of its own. For sequences ``(N, time, features)`` say -1.

    Raises:
        ValueError: If the prior is unknown or samples is below 1.

    Example:
        Every attribution of this model is on its first input: no map is sparser.

        >>> net = torch.nn.Linear(4, 2, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]]))
        >>> x, y = torch.rand(8, 4), torch.arange(8) % 2
        >>> [AttributionPrior(prior)(net, x, y).detach() for prior in ("sparsity", "gini")]
        [tensor(0.5000), tensor(0.2500)]

    References:
        Erion et al., `Improving performance of deep learning models with axiomatic attribution priors and expected
        gradients <https://arxiv.org/abs/1906.10670>`_, 2021; there the maps are not normalised, and the sparse prior is
        -2 times the Gini coefficient. The ratio of norms: Hoyer, `Non-negative Matrix Factorization with Sparseness
        Constraints <https://www.jmlr.org/papers/v5/hoyer04a.html>`_, 2004.
    """

    name: ClassVar[str] = "attribution_prior"
    method: ClassVar[Method] = "double_backward"  # there is no other way to it

    prior: Prior = "total_variation"
    samples: int = 1
    channel_dim: int | None = 1

    def __post_init__(self) -> None:
        if self.prior not in get_args(Prior):
            raise ValueError(
                f"AttributionPrior(prior=) must be one of {', '.join(map(repr, get_args(Prior)))}, got {self.prior!r}."
            )
        if self.samples < 1:
            raise ValueError(f"AttributionPrior(samples=) must be at least 1, got {self.samples}.")

    def __call__(
        self,
        logits_fn: LogitsFn,
        x: Tensor,
        y: Tensor,
        *,
        call: Callable[[Tensor], LossCall] | None = None,
        generator: Noise = None,
    ) -> Tensor:
        """The penalty, a scalar, differentiable with respect to the parameters behind ``logits_fn``.

        Args:
            logits_fn: Inputs to logits.
            x: Model inputs ``(N, ...)``.
            y: Targets, which say whose attributions are meant.
            call: Logits to the loss call of the head, where it is not the usual one.
            generator: Of backgrounds and of places on the way; None seeds one from torch's global stream. One
                generator, not one a sample: backgrounds are drawn among samples.

        Raises:
            ValueError: If no usual loss takes these logits and targets, the logits do not depend on ``x``, or ``x`` has
                no neighbours although they are to be alike.
        """
        call = call or (lambda z: LossCall.for_head(z, y))
        if not x.is_floating_point():
            raise ValueError(
                f"expected floating-point inputs, got {x.dtype}; instead of integer tokens give embeddings."
            )
        noise, again, x = drawn(generator), replayed(logits_fn), x.detach()
        total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        for _ in range(self.samples):
            difference = x - x[_others(x, noise)]
            way = uniform(x[(slice(None), *[slice(1)] * (x.ndim - 1))], noise)
            point = (x - way * difference).requires_grad_()
            score = one_a_sample(right_answer(call(again(point))), point)
            total = total + difference * input_gradient(score, point, create_graph=True)
        channels = channels_of(x, self.channel_dim)
        maps = total if channels is None else total.sum(channels)
        # The same for the mean over backgrounds and their sum: only the form of a map counts.
        size = maps.abs().flatten(1).mean(1).clamp_min(1e-12).view(-1, *[1] * (maps.ndim - 1))
        return _PRIORS[self.prior](maps / size)


def total_variation(maps: Tensor) -> Tensor:
    """Mean absolute step between neighbours, summed over the dimensions of maps ``(N, ...)``; a scalar.

    Raises:
        ValueError: If maps have one entry only.

    Example:
        >>> total_variation(torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]))
        tensor(1.)
    """
    steps = [maps.diff(dim=dim).abs().mean() for dim in range(1, maps.ndim) if maps.shape[dim] > 1]
    if not steps:
        raise ValueError(
            f"prior='total_variation' compares neighbours, but maps {tuple(maps.shape)} have none; choose 'gini' or "
            "'sparsity', or set channel_dim= to the dimension of channels."
        )
    return torch.stack(steps).sum()


def evenness(maps: Tensor) -> Tensor:
    """``1 - G``, where ``G`` is the Gini coefficient of the batch's mean magnitudes, 0 if all features matter alike.

    Example:
        >>> evenness(torch.ones(1, 4)), evenness(torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
        (tensor(1.), tensor(0.2500))
    """
    ordered = maps.abs().flatten(1).mean(0).sort().values
    n = len(ordered)
    rank = torch.arange(1, n + 1, dtype=ordered.dtype, device=ordered.device)
    return 1 - ((2 * rank - n - 1) * ordered).sum() / (n * ordered.sum().clamp_min(1e-12))


def density(maps: Tensor) -> Tensor:
    """``||m||_1 / (sqrt(D) ||m||_2)``, the mean over maps: 1 for even ones, ``1 / sqrt(D)`` for a single entry.

    Example:
        >>> density(torch.tensor([[0.0, 0.0, 0.0, 7.0]]))
        tensor(0.5000)
    """
    flat = maps.flatten(1)
    length = flat.square().mean(1).clamp_min(1e-24).sqrt()
    return (flat.abs().mean(1) / length).mean()


_PRIORS: dict[str, Callable[[Tensor], Tensor]] = {
    "total_variation": total_variation,
    "gini": evenness,
    "sparsity": density,
}


def _others(x: Tensor, noise: Noise) -> Tensor:
    """For each sample another one of the batch, no one taken twice."""
    order = uniform(torch.empty(len(x)), noise).argsort()
    # Each takes the next one of a random circle: a mere permutation leaves one sample at its own place on average.
    return torch.empty_like(order).scatter_(0, order, order.roll(1)).to(x.device)
