"""Every corruption has five settings in both tables; the shorter side chooses."""

from __future__ import annotations

import pytest

from lightning_robust.corruptions import CORRUPTIONS, GROUPS, SEVERITIES, TABLES, table_for


@pytest.mark.parametrize("table", TABLES)
def test_every_corruption_has_five_settings(table: str) -> None:
    assert set(TABLES[table]) == set(CORRUPTIONS)
    for settings in TABLES[table].values():
        assert len(settings) == len(SEVERITIES)
        assert len({len(parameters) for parameters in settings}) == 1


def test_groups_hold_every_corruption_once() -> None:
    assert [name for group in GROUPS.values() for name in group] == list(CORRUPTIONS)


@pytest.mark.parametrize(
    ("size", "table"), [((64, 64), "small"), ((65, 65), "imagenet"), ((28, 500), "small"), ((500, 65), "imagenet")]
)
def test_the_shorter_side_chooses_the_table(size: tuple[int, int], table: str) -> None:
    assert table_for(*size) == table
