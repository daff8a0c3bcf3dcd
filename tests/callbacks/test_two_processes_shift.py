"""Two processes on 101 samples (uneven) measure under shift what one measures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "two_processes_shift.py"


def run(processes: int, folder: Path) -> dict[str, float]:
    result = folder / f"{processes}.json"
    # A hang is a failure, not a test that never ends.
    subprocess.run([sys.executable, SCRIPT, str(processes), result], check=True, timeout=240, capture_output=True)
    metrics: dict[str, float] = json.loads(result.read_text())
    return metrics


def test_two_processes_measure_what_one_measures(tmp_path: Path) -> None:
    one, two = run(1, tmp_path), run(2, tmp_path)
    keys = {key for key in one if "shift" in key}
    assert keys == {key for key in two if "shift" in key}
    # A stream's samples have other numbers, and so other noise, where another process might have had some.
    assert two["stream shift/val/clean_accuracy"] == one["stream shift/val/clean_accuracy"]
    keys = {key for key in keys if not key.startswith("stream")}
    assert {key: two[key] for key in keys} == pytest.approx({key: one[key] for key in keys}, rel=1e-5, abs=1e-6)
    for key in keys:
        if key.endswith("accuracy"):
            assert two[key] == one[key], key  # counts are equal; the division is the same
    mean = one["whole shift/val/mean_accuracy"]
    assert 0.1 < mean < one["whole shift/val/clean_accuracy"]  # a case where a difference would show
    assert {"whole shift.one/val/mean_ece_scaled", "whole shift.other/val/loader/msp_auroc"} <= keys
    assert "whole shift/val/mean_f1" in keys
    assert 0 <= one["groups shift/val/worst_group_accuracy"] < one["groups shift/val/clean_accuracy"]
