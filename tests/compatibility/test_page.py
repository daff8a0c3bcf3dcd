"""The page of the documentation is the table of the tests."""

from __future__ import annotations

from pathlib import Path

from compatibility import table

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


def test_the_page_shows_the_table_that_is_tested() -> None:
    text = PAGE.read_text()
    assert table.summary() in text
    assert text.endswith(table.markdown())
