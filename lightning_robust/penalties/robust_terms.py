"""The terms that methods of adversarial training add to a loss, on any head."""

from __future__ import annotations

from torch import Tensor

from lightning_robust.divergence import kl_divergence
from lightning_robust.losses import LossCall
from lightning_robust.penalties.derivatives import positions
from lightning_robust.penalties.mart import misclassification_aware

__all__ = ["distillation", "mart", "mean_loss", "trades"]


def mean_loss(call: LossCall) -> Tensor:
    """The loss of a call as its usual reduction has it; see :meth:`LossCall.mean`."""
    return call.mean()


def trades(clean: LossCall, attacked: LossCall, beta: float) -> dict[str, Tensor]:
    """``beta * KL(clean prediction || attacked one)``, to be added to the loss at the clean input.

    It needs no labels: predictions without one (``ignore_index``) count as well.

    Example:
        >>> import torch
        >>> call = LossCall("cross_entropy", torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        >>> trades(call, call.again(torch.tensor([[0.0, 0.0]])), beta=6.0)
        {'kl': tensor(1.9669)}
    """
    divergence = kl_divergence(clean.log_probabilities(), attacked.log_probabilities())
    return {"kl": beta * divergence.mean() / positions(attacked)}


def mart(clean: LossCall, attacked: LossCall, beta: float) -> dict[str, Tensor]:
    """MART's two terms, to be added to the loss at the attacked input; see :func:`misclassification_aware`."""
    labels = attacked.class_view()[1]
    log_q = attacked.log_probabilities()
    labels = labels.argmax(1) if labels.shape == log_q.shape else labels
    margin, divergence = misclassification_aware(clean.log_probabilities(), log_q, labels)
    number = (labels >= 0).sum().clamp_min(1)
    return {"margin": margin.sum() / number, "kl": beta * divergence.sum() / number}


def distillation(taught: Tensor, attacked: LossCall, weight: float) -> dict[str, Tensor]:
    """``weight * KL(teacher's prediction || the attacked one)``; ``taught`` are the teacher's logits."""
    divergence = kl_divergence(attacked.again(taught).log_probabilities(), attacked.log_probabilities())
    return {"distillation": weight * divergence.mean() / positions(attacked)}
