"""Imports point downwards only, and the package itself imports nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_robust

ROOT = Path(lightning_robust.__file__).parent
TENSORS = (
    *("metrics", "attacks", "penalties", "saliency", "calibration", "ood", "corruptions"),
    *("pixels", "modes", "protocols", "losses", "divergence", "intervals", "randomness"),
    *("pictures", "charts"),
)
LIGHTNING = ("attach", "callbacks", "mixins")
RUNS = ("cli", "recipe", "recipe_keys", "report", "run", "audit", "tensorboard", "demo")
NAMESPACES = ("lightning", "pytorch_lightning", "lightning_fabric")
NAMES = [name for name in lightning_robust.__all__ if name != "__version__"]


def files(*parts: str) -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if part_of(path) in parts)


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it; the package's lazy names as the module they live in."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = (ROOT.name, *path.relative_to(ROOT).parts[:-1])
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            if module == ROOT.name:
                found |= {f"{module}.{lightning_robust._HOME.get(alias.name, alias.name)}" for alias in node.names}
            else:
                found.add(module)
    return found


def forbidden(path: Path, packages: tuple[str, ...], parts: tuple[str, ...]) -> list[str]:
    names = [tuple(name.split(".")) for name in imported(path)]
    return sorted(
        ".".join(name)
        for name in names
        if name[0] in packages or (name[0] == ROOT.name and len(name) > 1 and name[1] in parts)
    )


@pytest.mark.parametrize("path", files(*TENSORS), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_tensor_code_knows_neither_lightning_nor_what_stands_above_it(path: Path) -> None:
    assert forbidden(path, NAMESPACES, LIGHTNING + RUNS) == []


@pytest.mark.parametrize("path", files(*LIGHTNING), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_callbacks_know_nothing_of_runs(path: Path) -> None:
    assert forbidden(path, (), RUNS) == []


def test_every_file_belongs_to_a_stratum() -> None:
    strays = {part_of(path) for path in ROOT.rglob("*.py")} - {*TENSORS, *LIGHTNING, *RUNS}
    assert strays == {"__init__", "_version"}


def test_the_checker_sees_imports_in_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path / "lightning_robust")
    path = tmp_path / "lightning_robust" / "attacks" / "pgd.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import torch\nfrom ..run import fit\nfrom lightning_robust import PGD, cli, RobustAccuracy\n"
        "def late():\n    from lightning.pytorch import Trainer\n"
    )
    expected = ["lightning.pytorch", "lightning_robust.callbacks", "lightning_robust.cli", "lightning_robust.run"]
    assert forbidden(path, NAMESPACES, LIGHTNING + RUNS) == expected


def test_importing_the_package_imports_nothing_heavy_and_takes_no_time() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import lightning_robust; seconds = time.perf_counter() - start;"
        "print(seconds, *{'torch', 'pytorch_lightning', 'lightning', 'numpy'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, *heavy = run.stdout.split()
    assert heavy == []
    assert float(seconds) < 0.3


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_resolves_and_says_what_it_is(name: str) -> None:
    assert (getattr(lightning_robust, name).__doc__ or "").strip()


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_stands_in_the_documentation(name: str) -> None:
    checkout = ROOT.parent
    pages = [checkout / "README.md", *sorted((checkout / "docs").glob("*.md"))]
    assert [page.name for page in pages if name in page.read_text()], f"{name} is in none of {len(pages)} pages"


def test_dir_shows_the_public_names() -> None:
    assert dir(lightning_robust) == sorted(lightning_robust.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"lightning_robust.*has no attribute 'PGDD'"):
        lightning_robust.PGDD  # noqa: B018
