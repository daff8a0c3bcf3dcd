"""Calibration measures of logits and targets in one call each."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from lightning_robust.calibration.classwise import Classwise
from lightning_robust.calibration.confidence_grid import ConfidenceGrid
from lightning_robust.calibration.reliability import Norm, Reliability
from lightning_robust.losses import LossCall

__all__ = [
    "Mode",
    "adaptive_calibration_error",
    "aurc",
    "brier_score",
    "calibration_error",
    "check_mode",
    "classwise_calibration_error",
    "classwise_of",
    "grid_of",
    "negative_log_likelihood",
    "reliability_of",
]

Mode = Literal["top_label", "positive", "per_label"]
"""What is held against how often it is right: see :func:`calibration_error`."""


def calibration_error(
    logits: Tensor, targets: Tensor, bins: int = 15, norm: Norm = "l1", mode: Mode = "top_label"
) -> float:
    """The gap between how sure a model is and how often it is right.

    Arguments are always logits. They are never guessed to be probabilities, wherever their values lie.

    Args:
        logits: ``(N, K, ...)`` for classes; ``(N,)``, ``(N, 1)`` or ``(N, K)`` for yes/no outputs.
        targets: Classes ``(N, ...)``, rows of -100 left out; for yes/no outputs 0 or 1, floats if ``(N, K)``.
        bins: Bins of equal width; see :class:`~lightning_robust.calibration.Reliability`.
        norm: ``l1`` is the expected calibration error; ``rms``, ``max`` and ``debiased`` (of squares) are those of
            :meth:`Reliability.error <lightning_robust.calibration.Reliability.error>`.
        mode: ``top_label``: the likeliest class of each prediction, of yes/no outputs the likelier answer.
            ``positive``: the probability of yes, or of class 1 of two, against how often it is yes. ``per_label``: the
            same over all labels of a multi-label head together.

    Raises:
        ValueError: If the shapes fit no kind of head, the head does not fit the mode, or a target names no class.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> round(calibration_error(logits, torch.tensor([0, 0])), 4)  # 88 % sure, one of two right
        0.3808
    """
    return reliability_of(logits, targets, bins, mode).error(norm)


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """Mean negative log-likelihood of a single prediction, in nats; arguments as of :func:`calibration_error`."""
    return reliability_of(logits, targets, 1).mean_nll


def brier_score(logits: Tensor, targets: Tensor) -> float:
    """Mean squared error of all class probabilities, in [0, 2]; arguments as of :func:`calibration_error`.

    For yes/no outputs it is twice scikit-learn's ``brier_score_loss``: both yes and no are counted.

    Example:
        >>> import torch
        >>> brier_score(torch.zeros(1, 2), torch.tensor([0]))
        0.5
    """
    return reliability_of(logits, targets, 1).mean_brier


def adaptive_calibration_error(logits: Tensor, targets: Tensor, bins: int = 15) -> float:
    """Calibration error over bins of equal mass; see :meth:`~lightning_robust.calibration.ConfidenceGrid.adaptive`."""
    return grid_of(logits, targets).adaptive(bins)


def classwise_calibration_error(logits: Tensor, targets: Tensor, bins: int = 15) -> float:
    """Mean calibration error of each class, or label, against the rest, over those that are ever right."""
    return classwise_of(logits, targets, bins).ece


def aurc(logits: Tensor, targets: Tensor) -> float:
    """Area under the risk-coverage curve; see :attr:`~lightning_robust.calibration.ConfidenceGrid.aurc`."""
    return grid_of(logits, targets).aurc


def reliability_of(logits: Tensor, targets: Tensor, bins: int = 15, mode: Mode = "top_label") -> Reliability:
    """What :func:`calibration_error` counts."""
    check_mode(mode)
    call = LossCall.for_head(logits, targets)
    if mode == "top_label":
        return Reliability.of(*_rows(call), bins, overwrite=True)
    _check_head(call, mode)
    log_p, labels, _ = call.rows()
    # The loss in log space: 1 - p of a float32 probability of 1 is 0, and a sure error would be infinitely wrong.
    nll = -log_p.gather(1, labels.long()[:, None]).squeeze(1)
    return Reliability.of_events(log_p[:, 1].exp(), labels, bins, nll=nll)


def grid_of(logits: Tensor, targets: Tensor) -> ConfidenceGrid:
    """What :func:`adaptive_calibration_error` and :func:`aurc` count."""
    return ConfidenceGrid.of(*_rows(LossCall.for_head(logits, targets)))


def classwise_of(logits: Tensor, targets: Tensor, bins: int = 15) -> Classwise:
    """What :func:`classwise_calibration_error` counts; a single yes/no output is two classes."""
    call = LossCall.for_head(logits, targets)
    if _multi_label(call):
        return Classwise.of_labels(call.probabilities(), call.labels(), bins)
    return Classwise.of(*_rows(call), bins)


def _rows(call: LossCall) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``(R, K)``, which share no memory with the logits, and labels ``(R,)``."""
    labels = call.target
    if call.kind == "cross_entropy" and call.logits.ndim == 2 and len(labels):
        low, high = (int(end) for end in labels.aminmax())
        if low >= 0 and high < call.logits.shape[1]:  # nothing to leave out or to refuse: the common case, in a hurry
            return call.log_probabilities(), labels
    if call.binary and bool(((call.target != 0) & (call.target != 1)).any()):
        found = sorted({float(y) for y in call.target.flatten().tolist()} - {0.0, 1.0})[:10]
        raise ValueError(f"expected yes/no targets of 0 and 1, got {found}; leave rows without a label out.")
    log_p, labels, _ = call.rows()
    return log_p, labels


def _multi_label(call: LossCall) -> bool:
    return call.binary and call.logits.ndim == 2 and call.logits.shape[1] > 1


def check_mode(mode: str) -> None:
    """Whether there is such a mode.

    Raises:
        ValueError: If not.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"expected mode= to be one of {', '.join(get_args(Mode))}, got {mode!r}.")


def _check_head(call: LossCall, mode: Mode) -> None:
    shape = tuple(call.logits.shape)
    if mode == "per_label" and not call.binary:
        raise ValueError(
            f"mode='per_label' takes logits and float targets (N, K), got logits {shape} and classes; "
            "for one class a sample use classwise_calibration_error."
        )
    if mode == "positive" and _multi_label(call):
        raise ValueError(f"mode='positive' takes one yes/no output, got {shape[1]} labels; use mode='per_label'.")
    if mode == "positive" and not call.binary and shape[1] != 2:
        raise ValueError(f"mode='positive' takes a yes/no output or two classes, got {shape[1]} classes.")
