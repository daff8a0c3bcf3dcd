"""Detectors, groups, counts and attacked inputs: two processes on 101 samples (uneven) say what one says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "two_processes_ood.py"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], dict[str, float]]:
    folder = tmp_path_factory.mktemp("ood")
    # A hang is a failure, not a test that never ends.
    for processes in (1, 2):
        command = [sys.executable, SCRIPT, str(processes), folder / f"{processes}.json"]
        subprocess.run(command, check=True, timeout=200, capture_output=True)
    one, two = (json.loads((folder / f"{processes}.json").read_text()) for processes in (1, 2))
    return one, two


def of(found: dict[str, float], area: str) -> dict[str, float]:
    return {key: value for key, value in found.items() if key.startswith(area)}


@pytest.mark.parametrize(
    ("area", "metrics"),
    [
        ("ood/", 5 + 3 * 2),
        ("ood.loader/", 5 + 3 * 2),
        ("ood.small/", 5 + 2),
        ("ood.groups/", 5 + 5),
        ("ood.counts/", 5 + 3 * 2),
        ("ood.all/", 5),
        ("ood.fit/", 5 + 3 * 2),
    ],
)
def test_two_processes_say_what_one_says(
    both: tuple[dict[str, float], dict[str, float]], area: str, metrics: int
) -> None:
    one, two = (of(found, area) for found in both)
    # Interval and detection error go to loggers, as all but two measures of a detector do.
    sets = {key.split("/")[2] for key in one if key.endswith("_auroc") and "/near/" not in key and "/far/" not in key}
    assert sets == {"set", "few", *(["attacked"] if area in ("ood.groups/", "ood.counts/", "ood.all/") else [])}
    assert len(one) >= metrics * len(sets)
    assert two == pytest.approx(one, rel=1e-6, abs=1e-6)
    if area != "ood.small/":
        assert len({round(value, 3) for value in one.values()}) > 5  # a case where a difference would show


def test_groups_are_those_of_all_processes(both: tuple[dict[str, float], dict[str, float]]) -> None:
    for found in both:
        groups = {key.split("/")[3] for key in of(found, "ood.groups/") if "/group/" in key}
        assert groups == {"north", "south", "east"}
        assert "ood.groups/val/set/energy_worst_group_auroc" in found


def test_a_detector_that_fails_in_one_process_is_left_out_by_all(
    both: tuple[dict[str, float], dict[str, float]],
) -> None:
    one, two = (of(found, "ood.ill/") for found in both)
    assert any("one_fails" in key for key in one)
    assert not any("one_fails" in key for key in two)
    others = {key: value for key, value in one.items() if "one_fails" not in key}
    assert two == pytest.approx(others, rel=1e-6, abs=1e-6)


def test_what_one_process_cannot_read_all_leave_out_and_scores_of_logits_go_on(
    both: tuple[dict[str, float], dict[str, float]],
) -> None:
    found = of(both[1], "ood.bad/")
    expected = {k.replace("ood.fit/", "ood.bad/"): v for k, v in of(both[0], "ood.fit/").items()}
    names = ("mahalanobis", "knn", "vim")
    assert found == pytest.approx({k: v for k, v in expected.items() if not any(n in k for n in names)}, abs=1e-6)
