"""Which class a targeted attack wants to reach."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_robust.attacks.heads import Towards, head_of
from lightning_robust.attacks.search import Search
from lightning_robust.randomness import uniform

__all__ = ["Targets", "check_targets", "likeliest_wrong", "towards"]

Targets = Literal["given", "random", "least-likely", "runner-up"]


def check_targets(targeted: Any) -> None:
    """Whether targets can be chosen like this.

    Raises:
        ValueError: If not.
    """
    if targeted not in (None, *get_args(Targets)):
        raise ValueError(f"targeted= must be one of {', '.join(get_args(Targets))} or None, got {targeted!r}.")


def likeliest_wrong(logits: Tensor, y: Tensor, count: int) -> Tensor:
    """The ``count`` likeliest classes that are not the right one, ``(N, count, ...)``, likeliest first.

    Example:
        >>> likeliest_wrong(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]), 2)
        tensor([[2, 1]])
    """
    right = y.argmax(1) if y.shape == logits.shape else y.clamp_min(0)
    return logits.detach().float().scatter(1, right.long().unsqueeze(1), -torch.inf).topk(count, 1).indices


def towards(targeted: Targets, search: Search) -> Towards:
    """The objective of a targeted attack: the way to a class, chosen by the clean prediction.

    For yes/no outputs, pixels and several labels the choice is made for each of them.

    Raises:
        ValueError: If given targets are no classes.
    """
    owner, y = search.objective, search.y
    with torch.no_grad():
        logits, right = head_of(owner)(search.logits(search.clean), y)
    owner = owner if hasattr(owner, "head") else None
    if targeted == "given":
        if y.shape != logits.shape[:1] + logits.shape[2:]:
            raise ValueError(
                f"targeted='given' takes classes (N, ...) as y, got {tuple(y.shape)} for logits {tuple(logits.shape)}."
            )
        return Towards(y, owner)
    wrong = likeliest_wrong(logits, right, logits.shape[1] - 1)
    if targeted == "runner-up":
        return Towards(wrong[:, 0], owner)
    if targeted == "least-likely":
        return Towards(wrong[:, -1], owner)
    drawn = uniform(wrong[:, :1].float(), search.noise)
    return Towards(wrong.gather(1, (drawn * wrong.shape[1]).long()).squeeze(1), owner)
