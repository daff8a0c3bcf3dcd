"""Two processes on 101 samples (uneven): what is logged equals one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "two_processes.py"


def run(processes: int, folder: Path) -> dict[str, float]:
    result = folder / f"{processes}.json"
    # A hang is a failure, not a test that never ends.
    subprocess.run([sys.executable, SCRIPT, str(processes), result], check=True, timeout=240, capture_output=True)
    metrics: dict[str, float] = json.loads(result.read_text())
    return metrics


def test_two_processes_measure_what_one_measures_and_train_one_model(tmp_path: Path) -> None:
    one, two = run(1, tmp_path), run(2, tmp_path)
    trained = {key: two.pop(key) for key in ("trained_madry", "trained_trades")}
    keys = {key for key in one if key.startswith("robust") and "/val/" in key}
    about = 4  # the worst class, the interval, the number of samples
    assert len(keys) == (4 + about) + (3 + about)
    assert 0 < one["robust/val/accuracy"] < one["robust/val/clean_accuracy"]  # a case where a difference would show
    # Counts are equal; the division is the same.
    assert {key: two[key] for key in keys} == {key: one[key] for key in keys}
    assert one["robust.whole/val/clean_accuracy"] == pytest.approx(
        round(one["robust.whole/val/clean_accuracy"] * 101) / 101
    )
    assert all(0 <= value <= 1 for value in trained.values())
    others = {key for key in one if key.startswith(("calibration", "ood"))}
    # Calibration, its temperature, that of a choice of samples; five measures of four scores on three and two sets, and
    # two of what each of them accepts.
    assert len({key for key in others if key.startswith("calibration/val")}) == 14 + 7
    assert len({key for key in others if key.startswith("ood/val")}) == 3 * 4 * 5 + 4 * 2
    assert len({key for key in others if key.startswith("ood.given/val")}) == 2 * 4 * 5 + 4 * 2
    assert len({key for key in others if key.startswith("ood.single/val")}) == 5 + 2
    assert len({key for key in others if "/test/" in key}) == 14 + 3 * 4 * 5 + 2 * 4 * 5 + 2 * 4 * 2
    assert {"calibration/val/temperature", "calibration.few/val/temperature"} <= others
    assert one["calibration/val/temperature"] != one["calibration.few/val/temperature"]
    assert 0.05 < one["ood.given/val/set/energy_auroc"] < 0.95
    assert {key: two[key] for key in others} == pytest.approx({key: one[key] for key in others}, rel=1e-6, abs=1e-6)
