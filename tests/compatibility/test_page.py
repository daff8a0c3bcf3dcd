"""The pages say about the shapes of user code what their table says."""

from __future__ import annotations

import pathlib

import pytest
from compatibility import page, table

COMPATIBILITY, HOW_IT_WORKS = page.PAGES


def shown(path: pathlib.Path, name: str) -> str:
    """What stands on a page in one of its blocks."""
    return next(block[3] for block in page.BLOCK.finditer(path.read_text()) if block[2] == name)


def test_the_table_of_the_page_is_the_table_of_the_tests() -> None:
    assert shown(COMPATIBILITY, "table") == table.markdown()


@pytest.mark.parametrize(
    ("path", "name"), [(COMPATIBILITY, "counts"), (COMPATIBILITY, "arguments"), (HOW_IT_WORKS, "share")]
)
def test_numbers_in_the_text_are_counted_from_the_table(path: pathlib.Path, name: str) -> None:
    assert shown(path, name) == page.WRITERS[name]()


@pytest.mark.parametrize("path", page.PAGES, ids=lambda path: path.name)
def test_writing_a_page_anew_changes_nothing(path: pathlib.Path) -> None:
    assert page.written(path.read_text()) == path.read_text()


def test_counts_of_a_group_add_up_to_all_shapes() -> None:
    rows = [line.strip("| ").split("|") for line in page.counts().splitlines()[2:]]
    assert [sum(int(cell) for cell in cells if cell.strip()) for _, *cells in rows] == [len(table.SHAPES)] * len(rows)
