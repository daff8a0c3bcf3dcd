"""A share of the time since the start, the first ten seconds free."""

from __future__ import annotations

import pytest

from lightning_robust.callbacks.time_budget import TimeBudget


def test_what_is_spent_stays_below_the_share_and_ten_seconds() -> None:
    now = [0.0]
    budget = TimeBudget(0.1, clock=lambda: now[0])
    budget.start()
    spent = 0.0
    for second in range(1, 1001):
        now[0] = max(now[0], float(second))
        if budget.allows():
            with budget.spent():
                now[0] += 3
                spent += 3
        assert spent <= 10 + 0.1 * now[0] + 1e-9 or spent == 3
    assert budget.total == spent > 90  # and it is used


def test_without_a_share_everything_is_allowed_and_a_new_start_forgets() -> None:
    now = [0.0]
    free, tight = (TimeBudget(share, clock=lambda: now[0]) for share in (None, 0.01))
    for budget in (free, tight):
        with budget.spent():
            now[0] += 100
    assert free.allows()
    assert not tight.allows()
    tight.start()
    assert tight.allows()


def test_what_an_exception_cut_short_is_counted() -> None:
    now = [0.0]
    budget = TimeBudget(0.1, clock=lambda: now[0])

    def fail() -> None:
        with budget.spent():
            now[0] += 7
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert budget.total == 7
