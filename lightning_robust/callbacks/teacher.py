"""A robust network that another one learns from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Teacher"]


class Teacher:
    """A network or function from clean inputs to logits: it is not trained, and keeps the flags that it had.

    Args:
        network: Maps inputs to logits.
        weight: Of the divergence from what it says.
    """

    def __init__(self, network: Callable[..., Any], weight: float) -> None:
        self.network, self.weight = network, weight

    def __str__(self) -> str:
        return type(self.network).__name__

    def prepare(self, device: torch.device) -> Callable[[], None]:
        """Eval mode, on this device; returns what puts the flags back."""
        if not isinstance(self.network, nn.Module):
            return lambda: None
        flags = [(part, part.training) for part in self.network.modules()]
        self.network.to(device).eval()

        def undo() -> None:
            for part, training in flags:
                part.training = training

        return undo

    def logits(self, x: Tensor, like: Tensor, who: Any) -> Tensor:
        """What it says of the clean inputs ``x``, as logits of the shape and type of ``like``.

        Raises:
            ValueError: If it says something else.
        """
        with torch.no_grad():
            logits = self.network(x)
        if not isinstance(logits, Tensor) or logits.shape != like.shape:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"{who}: teacher= must map the input to logits {tuple(like.shape)}, as this module does, got {got}. "
                "Wrap it in a function if it returns something else."
            )
        return logits.to(like.dtype)
