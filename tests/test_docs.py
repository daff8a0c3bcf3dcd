"""What the documentation shows can be run.

Python blocks of a page run in order in one namespace (those opened with ``python no-run`` are only compiled); every
``lightning-robust`` line of a shell block parses, and its recipe composes with its overrides. A recipe that a page
shows is found by the file name in the comment on its first line: ``# my_recipe.yaml``.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lightning_robust.cli import _parser
from lightning_robust.recipe import available, compose

CHECKOUT = Path(__file__).parent.parent
PAGES = [page for page in (CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))) if page.is_file()]
FENCE = re.compile(r"^```([\w-]+)?([^\n]*)\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\s*(?:\$ )?(?:\S*/)?lightning-robust\s+(.*)$")
SHELL = ("bash", "sh", "console", "text")


class Block(NamedTuple):
    language: str
    info: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(match[1] or "", match[2].strip(), match[3], text.count("\n", 0, match.start(3)))
        for match in FENCE.finditer(text)
    ]


def commands(page: Path) -> list[str]:
    lines = (
        line
        for block in blocks(page)
        if block.language in SHELL
        for line in block.text.replace("\\\n", " ").splitlines()
    )
    return [match[1] for line in lines if (match := COMMAND.match(line))]


def arguments(command: str) -> list[str]:
    """Of one program: comments, pipes and redirections are the shell's."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    shell = [i for i, word in enumerate(words) if set(word) <= set("|&;<>")]
    return words[: shell[0]] if shell else words


def recipe_of(run: str) -> str:
    """The recipe of `runs/quickstart/version_0`, or of `quickstart`."""
    path = Path(run)
    return path.parent.name if path.name.startswith("version_") else run


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.language == "python" for b in blocks(p))], ids=lambda page: page.name
)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page):
        if block.language == "python":
            # Empty lines first, so that a traceback shows the line of the page.
            code = compile("\n" * block.line + block.text, str(page), "exec")
            if "no-run" not in block.info:
                exec(code, namespace)


@pytest.mark.parametrize(
    ("page", "command"), [pytest.param(p, c, id=f"{p.name}: {c}") for p in PAGES for c in commands(p)]
)
def test_command_lines_are_valid(page: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        shown = re.match(r"#\s*([\w-]+\.ya?ml)\b", block.text)
        if block.language in ("yaml", "yml") and shown:
            (tmp_path / shown[1]).write_text(block.text)
    words = arguments(command)
    if "--help" in words or "-h" in words:
        assert words[0] in ("fit", "test", "recipes", "--help", "-h")
        return
    parsed = _parser().parse_args(words)
    if parsed.command == "fit":
        assert compose(parsed.recipe, parsed.overrides).resolved["model"]
        assert parsed.beside is None or compose(parsed.beside).resolved["model"]
    elif parsed.command == "test":
        assert compose(recipe_of(parsed.run), parsed.overrides).resolved["model"]
    else:
        assert parsed.recipe is None or parsed.recipe in available()


def test_blocks_and_commands_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n```python no-run\nx = 1\n```\ntext\n```console\n$ lightning-robust fit quickstart \\\n"
        "    vars.eps=8/255  # a comment\nlightning-robust: an error\n"
        ".venv/bin/lightning-robust recipes a > b.yaml\n```\n"
    )
    assert [(b.language, b.info, b.line) for b in blocks(page)] == [("python", "no-run", 2), ("console", "", 6)]
    assert [arguments(c) for c in commands(page)] == [["fit", "quickstart", "vars.eps=8/255"], ["recipes", "a"]]


def anchors(page: Path) -> set[str]:
    """Of all headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text())
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> list[tuple[str, str]]:
    """File (empty for the page itself) and anchor of every link and picture that is not on the web."""
    found = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", FENCE.sub("", page.read_text()))
    return [(path, anchor) for path, anchor in found if not path.startswith("http")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_every_picture_leads_somewhere(page: Path) -> None:
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"
