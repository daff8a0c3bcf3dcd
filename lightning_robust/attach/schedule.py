"""How far a run has come, for radii and weights that grow."""

from __future__ import annotations

from typing import Any

__all__ = ["epochs_done", "warm"]


def epochs_done(trainer: Any, batch_idx: int) -> float:
    """Epochs of training so far, the present batch included; whole ones where their length is not known."""
    batches = trainer.num_training_batches
    part = 0.0 if batches == float("inf") else (batch_idx + 1) / batches
    return float(trainer.current_epoch + part)


def warm(done: float, over: float, start: float = 0.0) -> float:
    """A factor that grows linearly from 0 to 1 over so many epochs.

    Example:
        >>> [warm(done, over=4, start=1) for done in (0.5, 2, 5, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    if not over:
        return 1.0
    return min(1.0, max(0.0, (done - start) / over))
