"""Forwards that can be repeated, and first derivatives by the input: what penalties on input gradients share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_robust.attacks.search import HALF_SCALE
from lightning_robust.losses import LossCall
from lightning_robust.protocols import LogitsFn
from lightning_robust.randomness import Noise, RandomState, seeded

__all__ = [
    "Forward",
    "drawn",
    "finite",
    "forward",
    "input_gradient",
    "labelled",
    "one_a_sample",
    "positions",
    "replayed",
    "right_answer",
]


@dataclass(frozen=True)
class Forward:
    """One forward, and the way to another one that draws the same random numbers.

    Attributes:
        x: The inputs; where they are to be differentiated by, the leaf of the graph of ``logits``.
        logits: What the model says of them.
        again: Other inputs to their logits.
    """

    x: Tensor
    logits: Tensor
    again: LogitsFn

    def gradient(self, scalar: Callable[[Tensor], Tensor], *, reuse: bool) -> Tensor:
        """``d scalar(logits)_i / d x_i`` as numbers, no graph behind them; float32 or more.

        Args:
            scalar: Logits to one number a sample, ``(N,)``.
            reuse: Whether the graph of :attr:`logits` can be kept for a second backward pass; else one more forward is
                run for the gradient, and thrown away.
        """
        if reuse:
            return input_gradient(one_a_sample(scalar(self.logits), self.x), self.x, retain_graph=True)
        leaf = self.x.detach().requires_grad_()
        return input_gradient(one_a_sample(scalar(self.again(leaf)), leaf), leaf)


def forward(logits_fn: LogitsFn, x: Tensor, logits: Tensor | None = None, *, differentiable: bool = True) -> Forward:
    """The logits of ``x``, computed now unless they are given.

    All forwards see the same global random state (dropout drops the same units), which moves on as if there had been
    one. Each is given a copy, which it may write into.

    Args:
        logits_fn: Inputs to logits.
        x: Inputs ``(N, ...)``; data, not something to learn: no gradient flows back beyond it.
        logits: The logits of ``x``, where they have been computed already. ``x`` must then be the tensor with
            ``requires_grad`` in their graph, and a random ``logits_fn`` must itself repeat what was drawn for them.
        differentiable: Whether the gradient by ``x`` is had through these logits.

    Raises:
        ValueError: If ``x`` is not floating point, or does not require grad although ``logits`` are given.
    """
    if not x.is_floating_point():
        raise ValueError(f"expected floating-point inputs, got {x.dtype}; instead of integer tokens give embeddings.")
    if logits is None:
        x, again = x.detach().requires_grad_(differentiable), replayed(logits_fn)
        return Forward(x, again(x), again)
    if differentiable and not x.requires_grad:
        raise ValueError(
            "logits were given, but x does not require grad, so it is no part of their graph. Call x.requires_grad_() "
            "before the forward that computes them, or leave the logits out."
        )
    return Forward(x, logits, lambda x: logits_fn(x.clone()))


def replayed(logits_fn: LogitsFn) -> LogitsFn:
    """The same function, each of whose calls starts from the global random state of this moment.

    It is given a copy: a network whose first operation is in place would fail on a leaf, and else change its caller's.
    """
    start = RandomState.capture()

    def run(x: Tensor) -> Tensor:
        start.restore()  # two dropout masks would differ by more than a small step does
        return logits_fn(x.clone())

    return run


def drawn(generator: Noise) -> Noise:
    """A generator as it is; for None one of our own, whose seed alone is drawn from torch's global stream."""
    return seeded(int(torch.randint(2**62, ()))) if generator is None else generator


def one_a_sample(value: Tensor, x: Tensor) -> Tensor:
    """``value``, if it is one number for each sample of ``x``.

    Where a step flattens its pixels or tokens into rows before the loss, there are several for each sample, the first
    sample's first (as listeners read them): then it is their mean.

    Raises:
        ValueError: If it is neither.

    Example:
        >>> one_a_sample(torch.tensor([1.0, 3.0, 4.0, 6.0]), torch.zeros(2, 5))
        tensor([2., 5.])
    """
    if value.ndim == 1 and value.shape != x.shape[:1] and len(x) and len(value) and len(value) % len(x) == 0:
        return value.view(len(x), -1).mean(1)
    if value.shape != x.shape[:1]:
        raise ValueError(
            f"expected one number for each of {len(x)} samples, got {tuple(value.shape)}: logits must be (N, K, ...) "
            f"for inputs (N, ...), here {tuple(x.shape)}, or as many rows (K) for each sample."
        )
    return value


def input_gradient(value: Tensor, x: Tensor, *, retain_graph: bool = False, create_graph: bool = False) -> Tensor:
    """The gradient of the sum: with the mean, the weight of a penalty would depend on the batch size.

    In fp16 the sum is scaled on the way, and the gradient divided in float32: small ones would be 0.

    Raises:
        ValueError: If ``value`` does not depend on ``x``.
    """
    gradient, scale = None, HALF_SCALE if _in_fp16(x) else 1.0
    if value.requires_grad:
        # autograd.grad, not backward(): the parameters' own gradients must stay as they are.
        total = value.sum() if scale == 1.0 else value.sum() * scale
        (gradient,) = torch.autograd.grad(
            total, x, retain_graph=retain_graph or create_graph, create_graph=create_graph, allow_unused=True
        )
    if gradient is None:
        raise ValueError(
            "the logits do not depend on x: no gradient reaches it. Is x the very tensor they were computed from? Is "
            "the network (or a frozen backbone) run under torch.no_grad(), or is an output detached?"
        )
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return gradient if scale == 1.0 else gradient / scale


def _in_fp16(x: Tensor) -> bool:
    """Whether the network of these inputs computes in fp16; bfloat16 has the range of float32."""
    if x.dtype == torch.float16:
        return True
    kind = x.device.type
    if not hasattr(torch, "get_autocast_dtype"):  # torch 2.3
        return bool(torch.is_autocast_enabled() and torch.get_autocast_gpu_dtype() == torch.float16)
    return bool(torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16)


def positions(call: LossCall) -> int:
    """1, or pixels and labels of a sample (of a row), over which the usual loss averages too.

    Example:
        >>> positions(LossCall("cross_entropy", torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8).long()))
        64
        >>> positions(LossCall("binary_cross_entropy_with_logits", torch.zeros(2, 5), torch.zeros(2, 5)))
        5
    """
    return call.logits.shape[1 if call.binary else 2 :].numel()


def labelled(call: LossCall, n: int) -> Tensor:
    """How many predictions of each of ``n`` samples have a label, ``(n,)``; of one prediction a sample 1 or 0.

    Raises:
        ValueError: If there are not as many for each sample.

    Example:
        >>> labelled(LossCall("cross_entropy", torch.zeros(3, 4), torch.tensor([2, -100, 0])), 3)
        tensor([1, 0, 1])
    """
    if n and len(call.target) % n:
        raise ValueError(
            f"expected targets of {n} samples, or as many rows for each, got {tuple(call.target.shape)}: of some rows "
            "only (those under a mask) nobody can tell whose they are. Give the loss all of them, with ignore_index."
        )
    if call.binary or call.target.is_floating_point():
        return torch.full((n,), positions(call) * len(call.logits) // max(n, 1), device=call.logits.device)
    counted: Tensor = call.target != call.options.get("ignore_index", -100)
    return counted.reshape(n, -1).sum(1)


def finite(z: Tensor) -> Tensor:
    """Logits, or their logarithms, with 0 for classes that are switched off (-inf), of which nothing can be learnt."""
    return torch.where(z == -torch.inf, 0.0, z)


def right_answer(call: LossCall) -> Tensor:
    """What a model says for the right answer of each sample, ``(N,)``: the score that saliency explains.

    The logit of the right class, which does not level off as a model gets sure, unlike the loss; for heads that do not
    give the logits of classes (yes/no outputs, several labels, log-probabilities) the log-probability. Soft targets
    weigh the classes; pixels or labels of a sample are summed, and what has no label counts 0.

    Example:
        >>> right_answer(LossCall("cross_entropy", torch.tensor([[1.0, 3.0]]), torch.tensor([1])))
        tensor([3.])
        >>> right_answer(LossCall("binary_cross_entropy_with_logits", torch.zeros(1), torch.ones(1)))
        tensor([-0.6931])
    """
    scores, answers = call.class_view()
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if answers.shape == scores.shape:
        share = answers.exp() if call.options.get("log_target") else answers
        # A class that is switched off (-inf) and not asked for adds 0, not NaN.
        chosen = torch.where(share > 0, scores * share, 0.0).sum(1)
    else:
        found = scores.gather(1, answers.clamp_min(0).long().unsqueeze(1)).squeeze(1)
        chosen = torch.where(answers >= 0, found, 0.0)
    return chosen.flatten(1).sum(1) if chosen.ndim > 1 else chosen
