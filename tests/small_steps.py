"""A step whose gradients can be told by looking, and what is done to it."""

from __future__ import annotations

from typing import Any

import torch
import zoo
from torch.nn import functional as F

from lightning_robust.attach.step import Step


class Linear(zoo.Shape):
    """A loss whose gradient can be told by looking: the mean of w * x."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 1, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (
            F.cross_entropy(self.net.weight.expand(1, 1) * batch[0], torch.zeros(1).long()) * 0
            + (self.net(batch[0])).sum()
        )


def doubled(step: Step) -> Any:
    return [step.batch[0] * 2]


def ten_w(step: Step, call: Any, state: Any) -> dict[str, torch.Tensor]:
    return {"ten_w": 10 * step.module.net.weight.sum()}
