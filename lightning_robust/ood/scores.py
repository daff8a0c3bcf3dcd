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

__all__ = ["SCORES", "energy", "entropy", "max_logit", "msp", "scores_named", "two_class"]


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
    z = _checked(logits)
    top, winner = z.max(1, keepdim=True)
    others = (z - top).scatter(1, winner, -torch.inf).logsumexp(1)
    # lse(others) - lse(all), without the difference of two numbers that are nearly the same.
    return F.logsigmoid(others)


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


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "energy": energy,
    "max_logit": max_logit,
    "msp": msp,
    "entropy": entropy,
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


def _upcast(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _checked(logits: Tensor) -> Tensor:
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"expected logits (N, K) of at least two classes, got {tuple(logits.shape)}; "
            "one logit for yes or no becomes two with ood.two_class."
        )
    return _upcast(logits)
