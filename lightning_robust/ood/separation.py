"""How well a score tells out-of-distribution inputs from those that the model was made for."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["separation"]


def separation(s_in: Tensor, s_out: Tensor) -> dict[str, float]:
    r"""Area under the ROC curve, two average precisions and two false positive rates, each in [0, 1].

    Exact, of one sort: samples of equal score form one group that is never split, counts are integers, the rest is
    double precision. No value is squashed, so scores of any range will do.

    ======================  ============================================================================================
    ``auroc``               P(s_out > s_in) + P(s_out = s_in) / 2; whichever side is called positive
    ``aupr_out``            average precision, out-of-distribution positive
    ``aupr_in``             average precision, in-distribution positive (with the score negated)
    ``fpr95_ood_positive``  share of in-distribution samples at or above the highest threshold that catches at least
                            95 % of the others; the convention of OpenOOD from version 1.5 on
    ``fpr95_id_positive``   share of out-of-distribution samples at or below the lowest threshold that accepts at least
                            95 % of the others; the convention of ODIN, Energy and most older tables
    ======================  ============================================================================================

    The two rates may differ widely at one and the same AUROC. Average precision is the step-wise sum
    :math:`\sum_n (R_n - R_{n-1}) P_n`; it depends on how many samples there are of either kind.

    Args:
        s_in: Scores of in-distribution samples, ``(N,)``; higher = more out-of-distribution.
        s_out: Scores of out-of-distribution samples, ``(M,)``.

    Raises:
        ValueError: If a side is empty, not one-dimensional, or holds values that are not finite.

    Example:
        >>> found = separation(torch.tensor([0.1, 0.2, 0.3, 0.6]), torch.tensor([0.5, 0.7, 0.9]))
        >>> {name: round(value, 3) for name, value in found.items()}  # doctest: +NORMALIZE_WHITESPACE
        {'auroc': 0.917, 'aupr_in': 0.95, 'aupr_out': 0.917, 'fpr95_ood_positive': 0.25,
         'fpr95_id_positive': 0.333}

    References:
        Hendrycks and Gimpel, `A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural
        Networks <https://arxiv.org/abs/1610.02136>`_, 2017 (AUROC, both AUPRs); Liang et al., `Enhancing The
        Reliability of Out-of-distribution Image Detection in Neural Networks <https://arxiv.org/abs/1706.02690>`_, 2018
        (FPR at 95 % TPR).
    """
    sides = [_checked("s_in", s_in), _checked("s_out", s_out)]
    levels, level = torch.cat(sides).unique(return_inverse=True)  # type: ignore[no-untyped-call]  # as torch has it
    n_in, n_out = len(sides[0]), len(sides[1])
    inside = level[:n_in].bincount(minlength=len(levels))
    outside = level[n_in:].bincount(minlength=len(levels))
    # Twice the number of pairs in the right order: a tie is half a pair.
    pairs = outside * (2 * inside.cumsum(0) - inside)
    aupr_in, fpr_in = _precision_and_fpr95(inside, outside)
    aupr_out, fpr_out = _precision_and_fpr95(outside.flip(0), inside.flip(0))
    return {
        "auroc": int(pairs.sum()) / (2 * n_in * n_out),
        "aupr_in": aupr_in,
        "aupr_out": aupr_out,
        "fpr95_ood_positive": fpr_out,
        "fpr95_id_positive": fpr_in,
    }


def _precision_and_fpr95(positive: Tensor, negative: Tensor) -> tuple[float, float]:
    """Of how many positives and negatives there are at each level, the level most likely positive first."""
    tp, fp = positive.cumsum(0), negative.cumsum(0)
    n_positive, n_negative = int(tp[-1]), int(fp[-1])
    precision = tp.double() / (tp + fp)
    # In integers: 0.95 has no exact double, and 19 of 20 is enough.
    first = int((20 * tp >= 19 * n_positive).int().argmax())
    return float((positive * precision).sum()) / n_positive, int(fp[first]) / n_negative


def _checked(side: str, scores: Tensor) -> Tensor:
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"expected at least one score in {side} (N,), got {tuple(scores.shape)}.")
    wrong = int((~torch.isfinite(scores)).sum())
    if wrong:
        raise ValueError(
            f"expected finite scores, got {wrong} NaN or infinite ones of {len(scores)} in {side}; "
            "look for NaN or infinite logits."
        )
    return scores.detach().cpu().double()
