"""Two processes on 101 samples (uneven) log what one logs: by class, by group, by recalibrator, with sets."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "two_processes_calibration.py"


def run(processes: int, folder: Path) -> dict[str, float]:
    result = folder / f"{processes}.json"
    # A hang is a failure, not a test that never ends.
    done = subprocess.run(
        [sys.executable, SCRIPT, str(processes), result], check=False, timeout=240, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    metrics: dict[str, float] = json.loads(result.read_text())
    return metrics


def near(key: str) -> float:
    """How far two processes may be off: their sets are cut at one of 65,536 edges, curves bend at other means."""
    return 2e-2 if "set_size" in key or "coverage" in key else 1e-5 if "vector" in key or "isotonic" in key else 1e-6


def test_two_processes_measure_and_fit_what_one_does(tmp_path: Path) -> None:
    one, two = run(1, tmp_path), run(2, tmp_path)
    assert set(one) == set(two)
    for key in one:
        same = math.isnan(one[key]) and math.isnan(two[key])
        assert same or two[key] == pytest.approx(one[key], rel=near(key), abs=near(key)), key
    # Nothing of all that was asked for is missing.
    groups = {f"group/{name}/{metric}" for name in ("odd", "rare", "even") for metric in ("ece", "accuracy")}
    expected = {
        *(f"beside calibration/val/{name}" for name in groups | {"brier_resolution", "ece_debiased"}),
        *(f"beside calibration.codes/val/group/{code}/ece" for code in range(8)),
        *(f"calibration/val/worst_{what}" for what in ("class", "class_ece", "group_ece", "group_accuracy")),
        *(f"calibration/{s}/{name}_vector" for s in ("val", "test") for name in ("nll", "ece", "accuracy")),
        *(f"calibration/{s}/{name}_isotonic" for s in ("val", "test") for name in ("nll", "ece", "accuracy")),
        *(f"calibration/{s}/{name}_lac" for s in ("val", "test") for name in ("coverage", "set_size")),
        *(f"calibration/{s}/worst_group_ece_scaled" for s in ("val", "test")),
        *(f"calibration.{name}/val/temperature" for name in ("split", "own", "set", "few")),
        *(f"single calibration/val/{name}" for name in ("ece", "worst_group_ece", "nll_vector", "coverage_aps")),
        *(f"labels calibration/val/{name}" for name in ("ece_classwise", "nll_platt", "coverage_lac")),
    }
    assert expected <= set(one)
    assert one["calibration.own/val/temperature"] == one["calibration.set/val/temperature"]
