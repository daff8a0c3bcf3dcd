"""What is due when, by epochs, validations and steps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from lightning_robust.callbacks.cadence import Cadence


def test_epochs_count_in_all_their_validations() -> None:
    every_second = Cadence(epochs=2)
    due = [every_second.in_validation(epoch=1 + n // 2, validations=n + 1) for n in range(8)]  # two an epoch
    assert due == [False, False, True, True, False, False, True, True]
    assert all(Cadence().in_validation(epoch, 1) for epoch in range(1, 5))


def test_validations_count_over_epochs() -> None:
    assert [n for n in range(1, 10) if Cadence(validations=4).in_validation(epoch=1, validations=n)] == [4, 8]


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_steps_are_due_where_a_multiple_is_reached_or_passed(batch: int) -> None:
    cadence, at = Cadence(steps=4), range(0, 61, batch)
    due = [now for before, now in pairwise(at) if cadence.between(before, now)]
    expected = sorted({-(-multiple // batch) * batch for multiple in range(4, 61, 4)} & set(at))
    assert due == expected
    assert not cadence.between(4, 4)  # a batch without a step
    assert not cadence.in_validation(epoch=1, validations=1)
    assert not Cadence().between(3, 4)


@pytest.mark.parametrize("given", [{"steps": 0}, {"epochs": 0}, {"validations": -1}, {"steps": 2, "validations": 2}])
def test_two_ways_and_numbers_below_one_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="every_n_"):
        Cadence(**given)


def test_settings_name_the_argument() -> None:
    assert Cadence(epochs=3).settings() == {"every_n_epochs": 3}
    assert Cadence(validations=3).settings() == {"every_n_validations": 3}
    assert Cadence(steps=3).settings() == {"every_n_steps": 3}
