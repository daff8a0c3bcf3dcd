"""The command line, as people type it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lightning_robust.cli import main
from lightning_robust.recipe import available, compose
from lightning_robust.run import Results

QUICK = """
about: As standard, in seconds.
base: standard
callbacks:
  report: { init_args: { max_samples: 50, attacks: { init_args: { steps: 1, restarts: 1 } } } }
trainer:
  max_epochs: 1
  limit_train_batches: 2
  enable_progress_bar: false
  enable_model_summary: false
"""
DEFENDED = """
base: quick
callbacks:
  adversarial:
    class_path: lightning_robust.AdversarialTraining
    init_args:
      attack: { class_path: lightning_robust.ThreatModel, init_args: { norm: linf, eps: "${vars.eps}" } }
      method: n-fgsm
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with two quick recipes in it."""
    (tmp_path / "quick.yaml").write_text(QUICK)
    (tmp_path / "defended.yaml").write_text(DEFENDED)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- recipes ---------------------------------------------------------------------------------------------------------


def test_recipes_lists_every_shipped_recipe_with_what_it_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(available())
    assert all(compose(name).resolved["about"] in line for name, line in zip(available(), lines, strict=True))


@pytest.mark.parametrize("name", available())
def test_recipes_prints_one_that_composes_again(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", name]) == 0
    mine = tmp_path / "mine.yaml"
    mine.write_text(capsys.readouterr().out)
    assert compose(mine).resolved == compose(name).resolved


# -- fit and test ----------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_resolved_recipe_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "quickstart", "vars.eps=8/255", "--dry-run"]) == 0
    printed = OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out))
    assert printed == compose("quickstart", ["vars.eps=8/255"]).resolved
    assert sorted(path.name for path in folder.iterdir()) == ["defended.yaml", "quick.yaml"]


def test_overrides_may_stand_after_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "quickstart", "seed=3", "--dry-run", "vars.eps=8/255", "trainer.max_epochs=5"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert (printed.seed, printed.vars.eps, printed.trainer.max_epochs) == (3, 8 / 255, 5)


def test_fit_shows_the_table_and_where_the_run_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "quick.yaml"]) == 0
    out = capsys.readouterr().out
    run = Path("runs", "quick", "version_0")
    results = Results.read(run)
    assert f"clean accuracy {100 * results.metrics['robust/test/clean_accuracy']:.1f} %".split() in [
        line.split() for line in out.splitlines()
    ]
    assert f"run          {run}" in out
    assert f"checkpoint   {run / 'checkpoints' / 'best.ckpt'}" in out
    assert "--logdir runs" in out


def test_beside_trains_the_other_recipe_once_and_reuses_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fit", "defended.yaml", "vars.eps=0.1", "trainer.limit_train_batches=1", "--beside", "quick.yaml"]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert "First 'quick.yaml', to compare with." in first
    assert Results.read(Path("runs/quick/version_0")).resolved["vars"]["eps"] == 0.1
    assert main(command) == 0
    second = capsys.readouterr().out
    assert "to compare with" not in second
    assert [path.name for path in Path("runs/quick").iterdir()] == ["version_0"]
    assert "| on held-out test data | defended | quick |" in Path("runs/defended/version_1/results.md").read_text()
    table = [line for line in first.splitlines() if "%" in line]
    assert table == [line for line in second.splitlines() if "%" in line]
    assert len(table) == 4  # two accuracies, two ECEs with a 95 % interval


def test_beside_trains_again_what_was_trained_differently(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "quick.yaml"]) == 0
    assert main(["fit", "defended.yaml", "seed=1", "--beside", "quick.yaml"]) == 0
    assert "First 'quick.yaml', to compare with." in capsys.readouterr().out
    assert Results.read(Path("runs/quick/version_1")).seed == 1


def test_a_finished_run_can_be_tested_by_folder_and_by_name(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["fit", "quick.yaml", "--output", "elsewhere"]) == 0
    fitted = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    monkeypatch.chdir(folder.parent)  # what a run needs is in its folder
    assert main(["test", str(folder / "elsewhere" / "quick" / "version_0"), "vars.eps=0.2"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "%" in line] == fitted
    assert main(["test", "quick", "vars.eps=0.3", "--output", str(folder / "elsewhere")]) == 0
    assert "linf 0.3" in capsys.readouterr().out


def test_resume_without_a_folder_takes_the_newest_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "quick.yaml"]) == 0
    before = Results.read(Path("runs/quick/version_0"))
    assert main(["fit", "quick.yaml", "callbacks.report.init_args.max_samples=20", "--resume"]) == 0
    assert [path.name for path in Path("runs/quick").iterdir()] == ["version_0"]
    after = Results.read(Path("runs/quick/version_0"))
    # All epochs were done: nothing was trained, the same weights were tested again, on fewer samples.
    assert after.metrics["test/accuracy"] == before.metrics["test/accuracy"]
    assert after.resolved["callbacks"]["report"]["init_args"]["max_samples"] == 20


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("fit quickstrat", "Did you mean 'quickstart'?"),
        ("fit missing.yaml", "there is no such recipe"),
        ("fit quickstart trainer.max_epoch=5", "Did you mean 'trainer.max_epochs'?"),
        ("fit quickstart max_epochs", "overrides read key=value"),
        ("fit quickstart trainer.max_epochs=ten --dry-run", "max_epochs"),
        ("fit quickstart trainer.max_epochs=[", "max_epochs"),
        ("fit broken.yaml", "broken.yaml"),
        ("fit quickstart --resume", "there is no run of 'quickstart'"),
        ("fit quickstart --resume nowhere", "nowhere"),
        ("fit quick.yaml --beside standart", "Did you mean 'standard'?"),
        ("test quickstart", "neither a run's folder nor a recipe with a run"),
        ("recipes quickstrat", "Did you mean 'quickstart'?"),
    ],
)
def test_an_error_is_one_line_and_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    (folder / "broken.yaml").write_text("model: {class_path: [")
    assert main(command.split()) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("lightning-robust: ")]
    assert message in line
    assert captured.out == ""
    assert captured.err.endswith(line + "\n")


@pytest.mark.parametrize("argv", [[], ["fti", "quickstart"], ["fit", "quickstart", "--dryrun"], ["fit"]])
def test_a_command_that_is_none_shows_the_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: lightning-robust" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"]])
def test_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    code = (
        "import runpy, sys; sys.argv = ['lightning-robust', *sys.argv[1:]]\n"
        "try:\n    runpy.run_module('lightning_robust.cli', run_name='__main__')\n"
        "finally:\n    print('imported:', *{'torch', 'pytorch_lightning', 'omegaconf'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert run.returncode == 0
    assert run.stdout.startswith("usage: lightning-robust")
    assert run.stdout.endswith("imported:\n")


def test_an_override_behind_resume_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "quickstart", "--output", str(tmp_path), "--resume", "vars.eps=0.1"]) == 2
    assert "there is no run of 'quickstart'" in capsys.readouterr().err
