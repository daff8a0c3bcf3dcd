"""The Kullback-Leibler divergence between two predictions, the penalty of TRADES."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["kl_divergence", "kl_divergences"]


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""``KL(p || q)`` of each sample, ``(N,)``, in nats: how far ``q`` is from what ``p`` says.

    Both arguments are *log*-probabilities. With plain ones the gradient is infinite where a probability underflows
    (logits of 100 are enough).

    .. math:: \mathrm{KL}(p \,\|\, q) = \sum_k p_k (\log p_k - \log q_k)

    Args:
        log_p: Log-probabilities, ``(N, K, ...)``; classes in dimension 1, further dimensions are summed.
        log_q: The same shape.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> import torch
        >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
        >>> kl_divergence(p.log(), q.log())
        tensor([0.5108])

    References:
        Zhang et al., `Theoretically Principled Trade-off between Robustness and Accuracy
        <https://arxiv.org/abs/1901.08573>`_, 2019, equation 5 (there ``p`` is clean and ``q`` is attacked).
    """
    if log_p.shape != log_q.shape or log_p.ndim < 2:
        raise ValueError(f"expected two tensors (N, K, ...), got {tuple(log_p.shape)} and {tuple(log_q.shape)}.")
    return kl_divergences(log_p.float(), log_q.float()).reshape(len(log_p), -1).sum(1)


def kl_divergences(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The same for every prediction of a sample, ``(N, ...)``."""
    never = log_p == -float("inf")  # a class that is switched off adds 0, not 0 * (inf - inf)
    log_p, log_q = log_p.masked_fill(never, 0.0), log_q.masked_fill(never, 0.0)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
