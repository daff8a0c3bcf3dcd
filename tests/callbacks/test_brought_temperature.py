"""Which temperature of a checkpoint is taken, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_robust.callbacks.brought_temperature import brought

SHIFT = {"temperature": 2.0, "measured_step": 5}
CALIBRATION = {"temperature": 1.5, "fit_step": 9}


@pytest.mark.parametrize(
    ("sections", "temperature"),
    [
        ({"shift": SHIFT}, 2.0),
        ({"calibration": CALIBRATION}, 1.5),
        ({"shift": SHIFT, "calibration": CALIBRATION}, 1.5),
        ({"shift": SHIFT, "calibration": {**CALIBRATION, "fit_step": 5}}, 2.0),
        ({"shift": {"measured_step": 12}, "calibration": CALIBRATION}, 1.5),
    ],
)
def test_the_newest_temperature_is_taken_and_of_two_equals_its_own(
    sections: dict[str, Any], temperature: float
) -> None:
    found = brought({"global_step": 9, **sections}, "shift")
    assert found is not None
    assert found.temperature == temperature


def test_a_checkpoint_without_a_temperature_brings_none() -> None:
    assert brought({"global_step": 9, "shift": {"measured_step": 9}}, "shift") is None


def test_a_temperature_of_other_weights_is_said_and_one_of_the_same_is_not() -> None:
    stale, fresh = (brought({"global_step": step, "shift": SHIFT}, "shift") for step in (9, 5))
    assert stale is not None
    assert "fitted at step 5, its weights are from step 9" in stale.stale
    assert fresh is not None
    assert fresh.stale == ""


def test_a_lower_bound_changes_nothing_and_an_upper_one_is_taken() -> None:
    for temperature, expected in ((1 / 64, 1.0), (64.0, 64.0)):
        section = {**CALIBRATION, "temperature": temperature, "at_bound": True}
        found = brought({"global_step": 9, "calibration": section}, "shift")
        assert found is not None
        assert found.temperature == expected
