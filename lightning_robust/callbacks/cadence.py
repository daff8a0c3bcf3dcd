"""How often something is done while a model trains: by epochs, validations or optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Cadence"]


@dataclass(frozen=True)
class Cadence:
    """One of three ways to count.

    Attributes:
        epochs: Every so many epochs, in all their validations; the others take its place.
        validations: Every so many validations, or None.
        steps: Every so many optimizer steps, between validations, or None.

    Raises:
        ValueError: If a number is below 1, or two ways are given.

    Example:
        >>> [epoch for epoch in range(1, 8) if Cadence(epochs=3).in_validation(epoch, validations=epoch)]
        [3, 6]
    """

    epochs: int = 1
    validations: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        given = {"every_n_validations": self.validations, "every_n_steps": self.steps}
        given |= {"every_n_epochs": self.epochs if self.epochs != 1 else None}
        shown = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        if any(value is not None and value < 1 for value in given.values()):
            raise ValueError(f"every_n_epochs=, every_n_validations= and every_n_steps= are at least 1, got {shown}.")
        if sum(value is not None for value in given.values()) > 1:
            raise ValueError(f"one of every_n_epochs=, every_n_validations= and every_n_steps=, got {shown}.")

    def in_validation(self, epoch: int, validations: int) -> bool:
        """Whether a validation is due.

        Args:
            epoch: Number of the epoch, from 1 on.
            validations: How many there were, this one included.
        """
        if self.steps is not None:
            return False
        return (epoch % self.epochs if self.validations is None else validations % self.validations) == 0

    def between(self, before: int, now: int) -> bool:
        """Whether a step is due: several optimizers take several in a batch, accumulation takes none in most.

        Args:
            before: Steps taken up to the batch before.
            now: Steps taken up to this one.
        """
        return self.steps is not None and now // self.steps > before // self.steps

    def settings(self) -> Mapping[str, int]:
        """What was given, by the name of the argument."""
        if self.steps is not None:
            return {"every_n_steps": self.steps}
        if self.validations is not None:
            return {"every_n_validations": self.validations}
        return {"every_n_epochs": self.epochs}
