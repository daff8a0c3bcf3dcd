"""Out-of-distribution scores of logits: the higher, the more foreign the input.

Each takes raw logits ``(N, K)``, at no temperature, and returns ``(N,)``. Half precision is computed in float32, double
precision stays double.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["SCORES", "energy", "entropy", "gen", "margin", "max_logit", "msp", "scores_named", "two_class"]

GEN_EXPONENT, GEN_CLASSES = 0.1, 100  # gamma and M of the paper


def energy(logits: Tensor) -> Tensor:
    r"""The free energy, ``(N,)``: :math:`-\log \sum_k e^{z_k}`.

    Args:
        logits: ``(N, K)`` with K at least 2.

    Raises:
        ValueError: If the logits have another shape.

    Example:
        >>> energy(torch.tensor([[9.0, 0.0], [0.0, 0.0]]))
        tensor([-9.0001, -0.6931])

    References:
        Liu et al., `Energy-based Out-of-distribution Detection <https://arxiv.org/abs/2010.03759>`_, 2020, equation 4.
    """
    return -_checked(logits).logsumexp(1)


def max_logit(logits: Tensor) -> Tensor:
    r"""The largest logit, negated, ``(N,)``: :math:`-\max_k z_k`.

    Args:
        logits: ``(N, K)`` with K at least 2.

    Raises:
        ValueError: If the logits have another shape.

    Example:
        >>> max_logit(torch.tensor([[9.0, 0.0], [1.0, 2.0]]))
        tensor([-9., -2.])

    References:
        Hendrycks et al., `Scaling Out-of-Distribution Detection for Real-World Settings
        <https://arxiv.org/abs/1911.11132>`_, 2022, section 3.
    """
    return -_checked(logits).amax(1)


def msp(logits: Tensor) -> Tensor:
    r"""The maximum softmax probability in log space, ``(N,)``: :math:`\log(1 - \max_k p_k)`.

    It ranks as ``1 - p_max`` does, and goes on ranking where ``p_max`` in float32 is 1 for one input after the other.

    Args:
        logits: ``(N, K)`` with K at least 2.

    Raises:
        ValueError: If the logits have another shape.

    Example:
        >>> logits = torch.tensor([[40.0, 0.0], [50.0, 0.0]])
        >>> logits.softmax(1).amax(1)
        tensor([1., 1.])
        >>> msp(logits)
        tensor([-40., -50.])

    References:
        Hendrycks and Gimpel, `A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural
        Networks <https://arxiv.org/abs/1610.02136>`_, 2017.
    """
    return _log_doubt(_checked(logits))


def entropy(logits: Tensor) -> Tensor:
    r"""The entropy of the predicted classes in nats, ``(N,)`` in [0, log K]: :math:`-\sum_k p_k \log p_k`.

    Args:
        logits: ``(N, K)`` with K at least 2.

    Raises:
        ValueError: If the logits have another shape.

    Example:
        >>> entropy(torch.tensor([[0.0, 0.0], [9.0, 0.0]]))
        tensor([0.6931, 0.0012])

    References:
        Shannon, A Mathematical Theory of Communication, 1948.
    """
    log_p = _checked(logits).log_softmax(1)
    # A class that is ruled out (logit -inf) counts 0, not 0 times infinity.
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(1)


def gen(logits: Tensor) -> Tensor:
    r"""The generalised entropy, ``(N,)``: :math:`\sum_{m=1}^M p_m^\gamma (1 - p_m)^\gamma` over the likeliest classes.

    :math:`\gamma = 0.1` and M = 100, or all classes where there are fewer. So small an exponent hears the smallest
    probabilities: the score tells predictions apart that are all sure, by what is left for the other classes. It is
    computed from logarithms, so that it goes on ranking where the largest probability in float32 is 1.

    Args:
        logits: ``(N, K)`` with K at least 2.

    Raises:
        ValueError: If the logits have another shape.

    Example:
        >>> gen(torch.tensor([[0.0, 0.0], [9.0, 0.0], [40.0, 0.0]]))
        tensor([1.7411, 0.8131, 0.0366])

    References:
        Liu et al., `GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection
        <https://openaccess.thecvf.com/content/CVPR2023/html/Liu_GEN_Pushing_the_Limits_of_Softmax-Based_Out-of-Distribution_Detection_CVPR_2023_paper.html>`_,
        2023 (negated there).
    """
    z = _checked(logits)
    log_p = z.log_softmax(1).topk(min(z.shape[1], GEN_CLASSES), dim=1).values
    # Only the likeliest class can come near to 1; every other one has at most 1/2.
    log_rest = torch.cat([_log_doubt(z)[:, None], torch.log1p(-log_p[:, 1:].exp())], dim=1)
    return (GEN_EXPONENT * (log_p + log_rest)).exp().sum(1)


def margin(logits: Tensor) -> Tensor:
    r"""How far the largest logit is ahead of the second, negated, ``(N,)``, at most 0: :math:`z_{(2)} - z_{(1)}`.

    The log of the ratio of the two largest probabilities; of two classes it ranks as :func:`msp` does.

    Args:
        logits: ``(N, K)`` with K at least 2.

    Raises:
        ValueError: If the logits have another shape.

    Example:
        >>> margin(torch.tensor([[9.0, 0.0, 4.0], [3.0, 3.0, 3.0]]))
        tensor([-5., 0.])

    References:
        Scheffer et al., Active Hidden Markov Models for Information Extraction, 2001 (the margin, of probabilities).
    """
    top = _checked(logits).topk(2, dim=1).values
    return top[:, 1] - top[:, 0]


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "energy": energy,
    "max_logit": max_logit,
    "msp": msp,
    "entropy": entropy,
    "gen": gen,
    "margin": margin,
}
"""The scores by name."""


def scores_named(names: Sequence[str]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Those of :data:`SCORES` that are asked for, in the order of ``names``.

    Raises:
        ValueError: If there is no such score; the message names the nearest one.

    Example:
        >>> list(scores_named(["msp", "energy"]))
        ['msp', 'energy']
    """
    for name in names:
        if name not in SCORES:
            near = difflib.get_close_matches(str(name), SCORES, 1, cutoff=0.3)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"expected out-of-distribution scores out of {', '.join(SCORES)}; got {name!r}.{hint}")
    return {name: SCORES[name] for name in names}


def two_class(z: Tensor) -> Tensor:
    """The logits of a yes/no head as two classes, ``(N, 2)``: ``[-z/2, z/2]``.

    Their softmax is ``[1 - sigmoid(z), sigmoid(z)]``. Of all pairs that have it, this one scores a sure no as it scores
    a sure yes; ``[0, z]`` would call every no foreign.

    Args:
        z: ``(N,)`` or ``(N, 1)``.

    Raises:
        ValueError: If the logits have another shape.

    Example:
        >>> energy(two_class(torch.tensor([4.0, -4.0, 0.0])))
        tensor([-2.0181, -2.0181, -0.6931])
    """
    if z.ndim not in (1, 2) or z.shape[1:] not in ((), (1,)):
        raise ValueError(f"expected the logits (N,) or (N, 1) of a yes/no head, got {tuple(z.shape)}.")
    half = _upcast(z.reshape(-1)) / 2
    return torch.stack([-half, half], dim=1)


def _log_doubt(z: Tensor) -> Tensor:
    """The log of what the likeliest class leaves to the others, ``(N,)``."""
    top, winner = z.max(1, keepdim=True)
    others = (z - top).scatter(1, winner, -torch.inf).logsumexp(1)
    # lse(others) - lse(all), without the difference of two numbers that are nearly the same.
    return F.logsigmoid(others)


def _upcast(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _checked(logits: Tensor) -> Tensor:
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"expected logits (N, K) of at least two classes, got {tuple(logits.shape)}; "
            "one logit for yes or no becomes two with ood.two_class."
        )
    return _upcast(logits)
