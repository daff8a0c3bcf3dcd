"""What `pip install` brings works without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
RUN = """
import sys
import lightning_robust
assert lightning_robust.__file__.startswith(sys.argv[1]), lightning_robust.__file__
from lightning_robust.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True, capture_output=True)
    return target


def lightning_robust(installed: Path, folder: Path, *arguments: str) -> str:
    # PYTHONPATH stands before the editable checkout; RUN makes sure of it.
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, str(installed), *arguments]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_recipes_and_types_travel_in_the_wheel(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    recipes = {path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "recipes").rglob("*.yaml")}
    modules = {p.relative_to(CHECKOUT).as_posix() for p in (CHECKOUT / "lightning_robust").rglob("*.py")}
    assert recipes
    assert {f"lightning_robust/{name}" for name in recipes} <= inside
    assert {"lightning_robust/py.typed", *modules} <= inside
    assert {name.split("/")[0].rpartition(".")[2] for name in inside} == {"lightning_robust", "dist-info"}


def test_the_installed_command_is_the_command_line(installed: Path) -> None:
    (entry_points,) = installed.glob("lightning_robust-*.dist-info/entry_points.txt")
    assert "lightning-robust = lightning_robust.cli:main" in entry_points.read_text().splitlines()


def test_an_installed_recipe_composes_far_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    printed = lightning_robust(installed, tmp_path, "fit", "quickstart", "--dry-run")
    assert "class_path: lightning_robust.AdversarialTraining" in printed
    assert list(tmp_path.iterdir()) == []


def test_an_installed_recipe_trains_far_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    attack = "callbacks.report.init_args.attacks.init_args"
    few = ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.enable_progress_bar=false"]
    printed = lightning_robust(
        *(installed, tmp_path, "fit", "standard", *few),
        *(f"{attack}.steps=1", f"{attack}.restarts=1", "callbacks.report.init_args.max_samples=100"),
    )
    assert "accuracy under PGD-1, linf 0.2" in printed
    assert (tmp_path / "runs" / "standard" / "version_0" / "results.json").is_file()
