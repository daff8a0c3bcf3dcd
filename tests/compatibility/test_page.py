"""The page of the documentation is the table of the tests."""

from __future__ import annotations

from pathlib import Path

from compatibility import table

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


def test_the_page_shows_the_table_that_is_tested() -> None:
    text = PAGE.read_text()
    assert table.summary() in text
    assert text.endswith(table.markdown())


def test_other_pages_count_the_same_shapes() -> None:
    for page in (PAGE.parents[1] / "README.md", PAGE.with_name("changelog.md")):
        assert f"{len(table.SHAPES)} shapes of user code" in page.read_text()
