"""How well a score tells out-of-distribution inputs from those that the model was made for."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lightning_robust.intervals import NORMAL_95, wilson

__all__ = ["MEASURES", "separation", "separation_of_counts"]

MEASURES = (
    "auroc",
    "auroc_low",
    "auroc_high",
    "aupr_in",
    "aupr_out",
    "fpr95_ood_positive",
    "fpr95_low",
    "fpr95_high",
    "fpr95_id_positive",
    "detection_error",
)
"""What :func:`separation` finds, by name."""


def separation(s_in: Tensor, s_out: Tensor) -> dict[str, float]:
    r"""Areas under curves and error rates with their intervals, each in [0, 1].

    Exact: samples of equal score form one group that is never split, counts are integers, the rest is double precision.
    No value is squashed, so scores of any range will do.

    ======================  ============================================================================================
    ``auroc``               P(s_out > s_in) + P(s_out = s_in) / 2; whichever side is called positive
    ``auroc_low``           where its 95 % interval begins
    ``auroc_high``          and ends
    ``aupr_out``            average precision, out-of-distribution positive
    ``aupr_in``             average precision, in-distribution positive (with the score negated)
    ``fpr95_ood_positive``  share of in-distribution samples at or above the highest threshold that catches at least
                            95 % of the others; the convention of OpenOOD from version 1.5 on
    ``fpr95_low``           where the 95 % interval of ``fpr95_ood_positive`` begins
    ``fpr95_high``          and ends
    ``fpr95_id_positive``   share of out-of-distribution samples at or below the lowest threshold that accepts at least
                            95 % of the others; the convention of ODIN, Energy and most older tables
    ``detection_error``     the least mean of both error rates, (FPR + FNR) / 2, that any threshold reaches; at most 1/2
    ======================  ============================================================================================

    The two rates may differ widely at one and the same AUROC. Average precision is the step-wise sum
    :math:`\sum_n (R_n - R_{n-1}) P_n`; it depends on how many samples there are of either kind. Intervals take samples
    to be independent; :func:`separation_of_counts` says how they are made.

    Args:
        s_in: Scores of in-distribution samples, ``(N,)``; higher = more out-of-distribution.
        s_out: Scores of out-of-distribution samples, ``(M,)``.

    Raises:
        ValueError: If a side is empty, not one-dimensional, or holds values that are not finite.

    Example:
        >>> found = separation(torch.tensor([0.1, 0.2, 0.3, 0.6]), torch.tensor([0.5, 0.7, 0.9]))
        >>> {name: round(found[name], 3) for name in ("auroc", "aupr_in", "aupr_out", "detection_error")}
        {'auroc': 0.917, 'aupr_in': 0.95, 'aupr_out': 0.917, 'detection_error': 0.125}
        >>> found["fpr95_ood_positive"], round(found["fpr95_id_positive"], 3)
        (0.25, 0.333)

    References:
        Hendrycks and Gimpel, `A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural
        Networks <https://arxiv.org/abs/1610.02136>`_, 2017 (AUROC, both AUPRs); Liang et al., `Enhancing The
        Reliability of Out-of-distribution Image Detection in Neural Networks <https://arxiv.org/abs/1706.02690>`_, 2018
        (FPR at 95 % TPR, detection error).
    """
    inside, outside = _checked("s_in", s_in), _checked("s_out", s_out)
    # By numpy: torch sorts places along with values, which takes many times as long as sorting values alone.
    together = np.sort(np.concatenate([inside, outside]))
    last = np.flatnonzero(np.append(together[1:] != together[:-1], True))  # the end of each group of equal scores
    below_in = np.searchsorted(np.sort(inside), together[last], side="right")
    return separation_of_counts(
        torch.from_numpy(np.diff(below_in, prepend=0)),
        torch.from_numpy(np.diff(last + 1 - below_in, prepend=0)),
    )


def separation_of_counts(inside: Tensor, outside: Tensor) -> dict[str, float]:
    r"""What :func:`separation` finds, from how many samples there are at each level of the score.

    *The interval of the AUROC* is DeLong's: the variance of the mean placement of either side among the other, ties
    counted half, on the logit scale, so that it stays in [0, 1] and is longer towards 1/2. Where that variance is zero
    or not defined (sides wholly apart, all scores equal, one sample on a side) it is Newcombe's, the areas
    :math:`\theta` that are not further from the one found than 1.96 of their own standard errors.

    *The interval of the FPR* joins two doubts. The FPR at a given threshold is a share of in-distribution samples, with
    Wilson's interval. The right threshold has 5 % of all foreign data below it, so of M samples a binomial number: the
    FPR is read at the two ends of that number's 95 % range. Distances from the FPR found are joined by the root of
    their squares. With less than about 92 foreign samples the range reaches the end of the sample, and ``fpr95_high``
    is 1.

    Args:
        inside: In-distribution samples at each level, ``(L,)`` int64, the lowest score first.
        outside: Out-of-distribution samples at each level, ``(L,)`` int64.

    Raises:
        ValueError: If the two do not have the same levels, are no integers, or a side has no samples.

    Example:
        >>> found = separation_of_counts(torch.tensor([60, 30, 10]), torch.tensor([5, 20, 75]))
        >>> round(found["auroc"], 3), round(found["auroc_low"], 3), round(found["auroc_high"], 3)
        (0.877, 0.823, 0.917)

    References:
        DeLong et al., Comparing the Areas under Two or More Correlated Receiver Operating Characteristic Curves, 1988;
        Newcombe, Confidence intervals for an effect size measure based on the Mann-Whitney statistic, part 2, 2006
        (method 5); Zou and Donner, Construction of confidence limits about effect measures, 2008 (how two intervals
        are joined).
    """
    inside, outside = _checked_counts(inside, outside)
    below_in, below_out = inside.cumsum(0), outside.cumsum(0)  # at each level or below
    n_in, n_out = int(below_in[-1]), int(below_out[-1])
    # Doubles hold whole and half counts exactly up to 2**52; integers would be divided in single precision.
    here_in, here_out, upto_in, upto_out = (counts.double() for counts in (inside, outside, below_in, below_out))
    from_in, from_out = n_in - upto_in + here_in, n_out - upto_out + here_out  # at each level or above

    pairs = float(here_out @ (upto_in - here_in / 2))  # in the right order; a tie is half a pair
    auroc = min(1.0, pairs / (n_in * n_out))
    spread = _spread(auroc, here_in, here_out, upto_in, from_out)
    auroc_low, auroc_high = _auroc_interval(auroc, spread, n_in, n_out)
    fpr = _share_above(below_in, below_out, n_out // 20)
    fpr_low, fpr_high = _fpr_interval(fpr, below_in, below_out)
    accepted = int(torch.searchsorted(below_in, -(-19 * n_in // 20)))  # in integers: 19 of 20 is enough
    # Foreign samples missed below a level, false alarms from it on. To call nothing foreign is an error of 1/2.
    errors = (upto_out - here_out) / n_out + from_in / n_in
    return {
        "auroc": auroc,
        "auroc_low": auroc_low,
        "auroc_high": auroc_high,
        "aupr_in": float(here_in @ (upto_in / (upto_in + upto_out))) / n_in,
        "aupr_out": float(here_out @ (from_out / (from_out + from_in))) / n_out,
        "fpr95_ood_positive": fpr,
        "fpr95_low": fpr_low,
        "fpr95_high": fpr_high,
        "fpr95_id_positive": int(below_out[accepted]) / n_out,
        "detection_error": min(1.0, float(errors.min())) / 2,
    }


def _share_above(below_in: Tensor, below_out: Tensor, missed: int) -> float:
    """Of in-distribution samples, at or above the highest level that leaves at most ``missed`` foreign ones below."""
    n_in = int(below_in[-1])
    level = int(torch.searchsorted(below_out, missed, right=True))
    return (n_in - int(below_in[level - 1])) / n_in if level else 1.0


def _spread(auroc: float, here_in: Tensor, here_out: Tensor, upto_in: Tensor, from_out: Tensor) -> float:
    """DeLong's standard error: how placements among the other side vary, ties in the middle of their group."""
    n_in, n_out = float(upto_in[-1]), float(from_out[0])
    if min(n_in, n_out) < 2:
        return math.nan
    of_out = float(here_out @ ((upto_in - here_in / 2) / n_in - auroc).square()) / (n_out - 1)
    of_in = float(here_in @ ((from_out - here_out / 2) / n_out - auroc).square()) / (n_in - 1)
    return math.sqrt(of_out / n_out + of_in / n_in)


def _auroc_interval(auroc: float, spread: float, n_in: int, n_out: int) -> tuple[float, float]:
    if not spread > 1e-9 or auroc in (0.0, 1.0):
        return _newcombe_low(auroc, n_in, n_out), 1 - _newcombe_low(1 - auroc, n_in, n_out)
    factor = math.exp(NORMAL_95 * spread / (auroc * (1 - auroc)))
    return auroc / (auroc + (1 - auroc) * factor), auroc / (auroc + (1 - auroc) / factor)


def _newcombe_low(auroc: float, n_in: int, n_out: int) -> float:
    """The lowest area that is within 1.96 of its own standard errors (Hanley and McNeil, 1982) of the one found."""
    low, high = 0.0, auroc
    for _ in range(60):
        area = (low + high) / 2
        shared = ((n_in + n_out) / 2 - 1) * ((1 - area) / (2 - area) + area / (1 + area))
        variance = area * (1 - area) * (1 + shared) / (n_in * n_out)
        if (auroc - area) ** 2 > NORMAL_95**2 * variance:
            low = area
        else:
            high = area
    return low


def _fpr_interval(fpr: float, below_in: Tensor, below_out: Tensor) -> tuple[float, float]:
    n_in, n_out = int(below_in[-1]), int(below_out[-1])
    low, high = wilson(fpr, n_in)
    # How many foreign samples lie below the threshold that 5 % of all foreign data lie below.
    half = NORMAL_95 * math.sqrt(0.05 * 0.95 * n_out)
    fewest, most = math.floor(0.05 * n_out - half + 0.5), math.ceil(0.05 * n_out + half - 0.5)
    loosest = _share_above(below_in, below_out, fewest - 1) if fewest > 0 else 1.0
    strictest = _share_above(below_in, below_out, most) if most < n_out else 0.0
    return max(0.0, fpr - math.hypot(fpr - low, fpr - strictest)), min(1.0, fpr + math.hypot(high - fpr, loosest - fpr))


def _checked_counts(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    if inside.ndim != 1 or inside.shape != outside.shape or {inside.dtype, outside.dtype} != {torch.int64}:
        raise ValueError(
            "expected int64 counts (L,) of both sides at the same levels, got "
            f"{inside.dtype} {tuple(inside.shape)} and {outside.dtype} {tuple(outside.shape)}."
        )
    for side, counts in (("inside", inside), ("outside", outside)):
        if not int(counts.sum()) or int(counts.min()) < 0:
            raise ValueError(
                f"expected at least one sample {side} and no count below 0, got {int(counts.sum())} samples."
            )
    inside, outside = inside.detach().cpu(), outside.detach().cpu()
    filled = (inside + outside) > 0
    return (inside, outside) if bool(filled.all()) else (inside[filled], outside[filled])


def _checked(side: str, scores: Tensor) -> np.ndarray:
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"expected at least one score in {side} (N,), got {tuple(scores.shape)}.")
    wrong = int((~torch.isfinite(scores)).sum())
    if wrong:
        raise ValueError(
            f"expected finite scores, got {wrong} NaN or infinite ones of {len(scores)} in {side}; "
            "look for NaN or infinite logits."
        )
    values: np.ndarray = scores.detach().cpu().double().numpy()
    return values
