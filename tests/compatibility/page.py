"""What the documentation says about the shapes of user code, written from their table.

``PYTHONPATH=.:tests python -m compatibility.page`` writes it anew, between ``<!-- shapes: ... -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import pathlib
import re
from collections import Counter
from collections.abc import Callable

from compatibility import table
from compatibility.common import GROUPS, Shape

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PAGES = (DOCS / "compatibility.md", DOCS / "how-it-works.md")
BLOCK = re.compile(r"(<!-- shapes: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
OUTCOMES = {"yes": "works", "says so": "says that it measures nothing", "error": "clear error", "not yet": "not yet"}


def shapes() -> list[Shape]:
    return [table.shape_of(name) for name in table.SHAPES]


def counts() -> str:
    """How often each group of callbacks ends how."""
    found = {group: Counter(table.outcome(shape, group) for shape in shapes()) for group in GROUPS}
    used = [outcome for outcome in OUTCOMES if any(found[group][outcome] for group in GROUPS)]
    lines = [f"| of {len(shapes())} shapes | " + " | ".join(OUTCOMES[o] for o in used) + " |"]
    lines += ["|---" + "|---:" * len(used) + "|"]
    lines += [f"| {group} | " + " | ".join(str(found[group][o] or "") for o in used) + " |" for group in GROUPS]
    return "\n".join(lines) + "\n"


def share() -> str:
    """One sentence for who does not read the table."""
    silent = sum(table.needs(shape) == "nothing" for shape in shapes())
    lost = sum(all(table.outcome(shape, group) == "error" for group in GROUPS) for shape in shapes())
    return (
        f"Of {len(shapes())} shapes of user code that are trained in the tests, {silent} need no argument at all, "
        f"{len(shapes()) - silent} need one or two, and {lost} are refused by every callback.\n"
    )


def arguments() -> str:
    """What is said where something has to be said."""
    lines = ["| shape | argument |", "|---|---|"]
    for shape in shapes():
        said = {**shape.arguments, **shape.in_training}
        if said:
            told = ", ".join(f"`{key}={'...' if callable(value) else repr(value)}`" for key, value in said.items())
            lines.append(f"| {shape.about} | {told} |")
    return "\n".join(lines) + "\n"


WRITERS: dict[str, Callable[[], str]] = {
    "counts": counts,
    "share": share,
    "arguments": arguments,
    "table": table.markdown,
}


def written(text: str) -> str:
    """A page with all that is taken from the table as the table says it now."""
    return BLOCK.sub(lambda block: f"{block[1]}{WRITERS[block[2]]()}{block[4]}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page.read_text()))
