"""What MART adds to the cross-entropy at the attacked input."""

from __future__ import annotations

from torch import Tensor

from lightning_robust.divergence import kl_divergences

__all__ = ["misclassification_aware"]


def misclassification_aware(clean: Tensor, attacked: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    r"""The two terms of MART beside the cross-entropy, ``(N, ...)`` each.

    .. math::
        -\log\bigl(1 - \max_{k \ne y} p_k(x')\bigr), \qquad
        \mathrm{KL}\bigl(p(x) \,\|\, p(x')\bigr) \, \bigl(1 - p_y(x)\bigr)

    The first one widens the margin at the attacked input; the second one asks for the same prediction, the more so the
    less sure the clean one is of the right class. Both are computed from log-probabilities and stay finite.

    Args:
        clean: Log-probabilities at the clean input, ``(N, K, ...)``.
        attacked: Log-probabilities at the attacked input, the same shape.
        y: Right classes, ``(N, ...)``; negative where there is none.

    Returns:
        The margin term and the weighted divergence of each prediction; 0 where there is no right class.

    Example:
        >>> import torch
        >>> p = torch.tensor([[0.5, 0.3, 0.2]])
        >>> [round(float(term), 4) for term in misclassification_aware(p.log(), p.log(), torch.tensor([0]))]
        [0.3567, 0.0]

    References:
        Wang et al., `Improving Adversarial Robustness Requires Revisiting Misclassified Examples
        <https://openreview.net/forum?id=rklOg6EFwS>`_, 2020, equations 8 to 11.
    """
    counted = (y >= 0).to(attacked.dtype)
    index = y.clamp_min(0).long().unsqueeze(1)
    likeliest = attacked.scatter(1, index, -float("inf")).argmax(1, keepdim=True)
    # log(1 - p_k) as the logarithm of what all other classes have together.
    others = attacked.scatter(1, likeliest, -float("inf")).logsumexp(1)
    unsure = 1 - clean.gather(1, index).squeeze(1).exp()
    return -others * counted, kl_divergences(clean, attacked) * unsure * counted
