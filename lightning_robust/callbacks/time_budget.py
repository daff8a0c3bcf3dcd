"""A share of the training time that looking at it may cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["TimeBudget"]

FREE = 10.0  # seconds: in a run of a minute a share says nothing


class TimeBudget:
    """Keeps what is spent below a share of the time since :meth:`start`; the first ten seconds are free.

    Args:
        share: In (0, 1]; None for no limit.
        clock: Seconds, for tests.

    Raises:
        ValueError: If the share is out of range.

    Example:
        >>> now = [0.0]
        >>> budget = TimeBudget(0.05, clock=lambda: now[0])
        >>> budget.start()
        >>> with budget.spent():
        ...     now[0] += 20.0
        >>> budget.allows()  # another 20 seconds would make 40 in all, of a run of 20
        False
        >>> now[0] = 700.0
        >>> budget.allows()
        True
    """

    def __init__(self, share: float | None, clock: Callable[[], float] = time.perf_counter) -> None:
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"budget= must be a share of the training time in (0, 1], or None, got {share}.")
        self.share, self._clock = share, clock
        self.start()

    def start(self) -> None:
        """Count from now."""
        self._began, self.total, self._last = self._clock(), 0.0, 0.0

    def allows(self) -> bool:
        """Whether one more like the last one stays within the share."""
        if self.share is None:
            return True
        return self.total + self._last <= FREE + self.share * (self._clock() - self._began)

    @contextmanager
    def spent(self, *, counts: bool = True, typical: bool = True) -> Iterator[None]:
        """Count what happens inside.

        Args:
            counts: Whether it is part of what may not exceed the share.
            typical: Whether the next one is expected to take as long.
        """
        began = self._clock()
        try:
            yield
        finally:
            took = self._clock() - began
            self.total += took if counts else 0.0
            self._last = took if typical else self._last
