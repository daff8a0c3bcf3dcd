"""Runs: what every shipped recipe leaves behind, and how a killed one goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_robust import load_temperature, run
from lightning_robust.recipe import RecipeError, available, compose
from lightning_robust.report import cells
from lightning_robust.run import Results

FEW = [
    *("trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1"),
    *("trainer.limit_test_batches=1", "trainer.enable_progress_bar=false", "trainer.enable_model_summary=false"),
]


def few_steps(name: str) -> list[str]:
    """Overrides that leave every attack of a recipe one step."""
    changes = []
    recipe = compose(name).resolved
    changes += ["vars.worst_samples=2"] if "worst_samples" in recipe["vars"] else []
    if "shift" in recipe["callbacks"]:
        changes += ["vars.samples=2", "callbacks.ood.init_args.fit_samples=64"]
        changes += ["callbacks.ood.init_args.attacked.init_args.steps=1", "callbacks.ood.init_args.max_samples=20"]
    for callback, settings in recipe["callbacks"].items():
        if settings.get("init_args", {}).get("masking"):  # it is right about a net of two steps, and warns
            changes.append(f"callbacks.{callback}.init_args.masking=false")
        for argument in ("attack", "attacks"):
            attack = settings.get("init_args", {}).get(argument)
            if isinstance(attack, dict):
                given = {"steps", "restarts"} & set(attack.get("init_args", {}))
                changes += [f"callbacks.{callback}.init_args.{argument}.init_args.{key}=1" for key in sorted(given)]
    return changes


def fit(name: str | Path, output: Path, *overrides: str, **options: Any) -> Results:
    results = run.fit(name, [*FEW, *few_steps(str(name)), *overrides], output=output, **options)
    assert results is not None
    return results


TRAINED = [name for name in available() if name not in ("calibrate", "adversarial/cifar10")]  # which want more


@pytest.fixture(scope="module", params=TRAINED)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    torch.set_num_threads(1)
    return fit(request.param, tmp_path_factory.mktemp("runs"))


def attacks(results: Results) -> bool:
    return any("RobustAccuracy" in c["class_path"] for c in results.resolved["callbacks"].values())


def measures_everything(results: Results) -> bool:
    """Recipes of `adversarial/` are about attacks alone, those of `reliability/` show no maps."""
    return {"ood", "saliency"} <= set(results.resolved["callbacks"])


def exactly(metrics: dict[str, float]) -> Any:
    """Every number to the bit; what is no number (the share kept of an accuracy at chance) is none in either."""
    return pytest.approx(metrics, rel=0, abs=0, nan_ok=True)


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


# -- what a run leaves behind ----------------------------------------------------------------------------------------


def test_a_run_leaves_its_recipe_its_results_and_its_weights(finished: Results) -> None:
    folder = Path(finished.run)
    assert folder.as_posix().endswith(f"/{finished.recipe}/version_0")
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"recipe.yaml", "recipe.resolved.yaml", "results.json", "results.md"} <= written
    # A recipe may leave the choice of weights out (`checkpoint: null`); the last ones are kept in any case.
    kept = {"last"} if finished.resolved["callbacks"].get("checkpoint") is None else {"best", "last"}
    assert {f"checkpoints/{name}.ckpt" for name in kept} <= written
    assert Path(str(finished.checkpoint)) == folder / "checkpoints" / f"{min(kept)}.ckpt"


def test_results_are_read_back_as_they_were(finished: Results) -> None:
    folder = Path(finished.run)
    read = Results.read(folder)
    assert read.metrics == exactly(finished.metrics)
    assert replace(read, metrics=finished.metrics) == finished
    assert json.loads((folder / "results.json").read_text())["written_by"].startswith("lightning_robust ")
    areas = {"test/accuracy"}
    if measures_everything(finished):
        areas |= {
            "calibration/test/ece_scaled",
            "ood/test/letters/energy_auroc",
            "saliency/val_gradcam/iou10_to_anchor",
        }
    if finished.recipe.startswith("reliability/"):
        areas |= {"ood/test/letters/knn_auroc"}
    assert areas <= set(finished.metrics)
    if attacks(finished):
        assert finished.metrics["robust/test/accuracy"] <= finished.metrics["robust/test/clean_accuracy"]


def test_the_written_recipe_is_the_one_that_ran(finished: Results) -> None:
    folder = Path(finished.run)
    for name in (run.RAW, run.RESOLVED):
        assert compose(folder / name).resolved == finished.resolved
    assert finished.resolved["trainer"]["max_epochs"] == 1


def test_the_table_is_written_as_markdown_and_json(finished: Results) -> None:
    assert (Path(finished.run) / "results.md").read_text() == run.table([finished]) + "\n"
    (column,) = json.loads((Path(finished.run) / "table.json").read_text())
    assert column == {"recipe": finished.recipe, **cells(finished.metrics)}


def test_tensorboard_shows_the_recipe_the_curves_and_what_the_attack_did(finished: Results) -> None:
    accumulator = events(Path(finished.run))
    for tag, name in (("recipe/raw", run.RAW), ("recipe/resolved", run.RESOLVED)):
        (event,) = accumulator.Tensors(f"{tag}/text_summary")
        shown = event.tensor_proto.string_val[0].decode()
        assert shown == f"```yaml\n{(Path(finished.run) / name).read_text()}```"
    pictures: set[str] = set()
    curves = {"val/accuracy"}
    if measures_everything(finished):
        pictures = {"saliency/val_gradient/filmstrip", "calibration/val/reliability"}
        curves |= {"calibration/val/temperature", "ood/val/letters/energy_auroc", "calibration/test/ece"}
    if attacks(finished):
        pictures, curves = pictures | {"robust/test/examples"}, curves | {"robust/test/accuracy"}
    assert pictures <= set(accumulator.Tags()["images"])
    assert curves <= set(accumulator.Tags()["scalars"])


def test_evaluating_a_run_again_gives_the_same_numbers_and_writes_nothing(finished: Results) -> None:
    folder = Path(finished.run)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = run.evaluate(folder)
    assert again is not None
    assert again.metrics == exactly(finished.metrics)
    assert again.checkpoint == finished.checkpoint
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


# -- an existing checkpoint ------------------------------------------------------------------------------------------


def test_a_checkpoint_is_calibrated_and_measured_without_training(tmp_path: Path) -> None:
    trained = fit("standard", tmp_path, "callbacks.temperature=null", "callbacks.saliency=null")
    before = Path(str(trained.checkpoint)).read_bytes()
    with pytest.raises(KeyError, match="no temperature"):
        load_temperature(str(trained.checkpoint))
    changes = [f"vars.checkpoint={trained.checkpoint}", "trainer.max_epochs=0"]  # behind the 1 of all others
    results = fit("calibrate", tmp_path, *changes, "callbacks.saliency=null")
    assert Path(str(trained.checkpoint)).read_bytes() == before
    assert Path(str(results.checkpoint)) == Path(results.run) / "checkpoints" / "calibrated.ckpt"
    kept, written = (torch.load(str(r.checkpoint), weights_only=True) for r in (trained, results))
    assert all(torch.equal(kept["state_dict"][name], value) for name, value in written["state_dict"].items())
    assert kept["optimizer_states"][0]["param_groups"] == written["optimizer_states"][0]["param_groups"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it belongs to these weights
        temperature = load_temperature(str(results.checkpoint))
    assert results.metrics["calibration/test/temperature"] == pytest.approx(temperature)
    for name in ("robust/test/accuracy", "calibration/test/nll", "ood/test/letters/energy_auroc"):
        assert results.metrics[name] == trained.metrics[name]


def test_a_missing_checkpoint_is_an_error_that_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"vars\.checkpoint=best\.ckpt.*got vars\.checkpoint=None"):
        run.fit("calibrate", ["trainer.enable_progress_bar=false"], output=tmp_path)


# -- single facts ----------------------------------------------------------------------------------------------------


def test_runs_are_numbered_and_the_latest_is_found(tmp_path: Path) -> None:
    assert run.latest(tmp_path, "standard") is None
    first, second = fit("standard", tmp_path), fit("standard", tmp_path)
    assert [Path(r.run).name for r in (first, second)] == ["version_0", "version_1"]
    assert first.metrics == second.metrics
    assert run.latest(tmp_path, "standard") == tmp_path / "standard" / "version_1"
    (tmp_path / "standard" / "version_1" / run.RESULTS).unlink()
    assert run.latest(tmp_path, "standard", finished=True) == tmp_path / "standard" / "version_0"


def test_a_run_can_be_evaluated_with_another_attack_and_other_weights(tmp_path: Path) -> None:
    folder = Path(fit("standard", tmp_path, "callbacks.report.init_args.max_samples=50").run)
    last = str(folder / "checkpoints" / "last.ckpt")
    again = run.evaluate(folder, ["vars.eps=4/8"], checkpoint=last)
    assert again is not None
    assert again.checkpoint == last
    assert "robust/test/accuracy_pgd1_linf_0.5" in again.metrics


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    assert run.fit("quickstart", output=tmp_path / "runs", dry=True) is None
    assert not (tmp_path / "runs").exists()


def test_without_a_test_step_there_are_no_results_but_a_trained_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "untested.py").write_text(
        "from pytorch_lightning import LightningModule\n"
        "from pytorch_lightning.demos.boring_classes import BoringModel\n"
        "class Untested(BoringModel):\n    test_step = LightningModule.test_step\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    boring = tmp_path / "boring.yaml"
    boring.write_text("model: {class_path: untested.Untested}\n")
    assert run.fit(boring, FEW, output=tmp_path / "runs") is None
    assert list((tmp_path / "runs" / "boring" / "version_0" / "checkpoints").glob("*.ckpt"))


def test_a_run_without_a_fixed_seed_is_reported_too(tmp_path: Path) -> None:
    assert fit("standard", tmp_path, "seed=null").metrics


def test_a_run_without_tensorboard_is_reported_too(tmp_path: Path) -> None:
    results = fit("standard", tmp_path, "trainer.logger=false")
    assert Path(str(results.checkpoint)).is_relative_to(tmp_path / "standard" / "version_0")


# -- tables ----------------------------------------------------------------------------------------------------------


def column(name: str, **metrics: float) -> Results:
    keys = {f"robust/test/{key}": value for key, value in metrics.items()}
    return Results(name, f"runs/{name}/version_0", None, {"test/loss": 1.0, **keys}, 0, 1.0, {})


def test_one_column_shows_accuracies_in_percent_and_nothing_but_robustness() -> None:
    accuracies = {"clean_accuracy": 0.976, "accuracy": 0.5, "accuracy_pgd20x2_linf_0.2": 0.5}
    assert run.table([column("a", **accuracies)]).splitlines() == [
        "| on held-out test data | a |",
        "| --- | ---: |",
        "| clean accuracy | 97.6 % |",
        "| accuracy under PGD-20 with 2 restarts, linf 0.2 | 50.0 % |",
    ]


def test_the_worst_case_stands_in_the_table_when_there_are_several_attacks() -> None:
    rows = run.table([column("a", accuracy=0.25, accuracy_weak=0.5, accuracy_strong=0.25)]).splitlines()
    assert "| accuracy, worst of 2 attacks | 25.0 % |" in rows
    assert "| accuracy under weak | 50.0 % |" in rows


def test_two_columns_stand_side_by_side_with_a_dash_for_what_was_not_measured() -> None:
    shown = run.table([column("a", clean_accuracy=0.9, accuracy_weak=0.5), column("b", clean_accuracy=0.95)])
    assert shown.splitlines() == [
        "| on held-out test data | a | b |",
        "| --- | ---: | ---: |",
        "| clean accuracy | 90.0 % | 95.0 % |",
        "| accuracy under weak | 50.0 % | - |",
    ]


def test_what_only_the_second_column_measured_stands_in_the_table_too() -> None:
    shown = run.table([column("a", clean_accuracy=0.9), column("b", clean_accuracy=0.95, accuracy_weak=0.4)])
    assert "| accuracy under weak | - | 40.0 % |" in shown.splitlines()


# -- kill and resume -------------------------------------------------------------------------------------------------

KILLER = """
import os, signal
from pytorch_lightning import Callback
class Killer(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 2 and batch_idx == 0:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_goes_on_in_its_folder_and_ends_after_all_epochs(tmp_path: Path) -> None:
    (tmp_path / "killer.py").write_text(KILLER)
    overrides = [*FEW, *few_steps("quickstart"), "trainer.max_epochs=4", "callbacks.killer.class_path=killer.Killer"]
    code = f"from lightning_robust import run; run.fit('quickstart', {overrides!r}, output={str(tmp_path / 'runs')!r})"
    # The working folder, and with it killer.py, is on the path of `python -c`.
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = tmp_path / "runs" / "quickstart" / "version_0"
    assert state(folder) == (1, 4)
    assert not (folder / run.RESULTS).exists()

    results = run.fit("quickstart", ["callbacks.killer=null"], output=tmp_path / "runs", resume=folder)
    assert results is not None
    assert Path(results.run) == folder
    assert state(folder)[1] == 8
    assert not list((folder / "checkpoints").glob("*-v*.ckpt"))
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"]
    assert [event.step for event in events(folder).Scalars("val/accuracy")] == [1, 3, 5, 7]


def test_the_last_checkpoint_is_of_the_last_epoch_also_when_nothing_improves(tmp_path: Path) -> None:
    # Otherwise a killed run goes on from its best epoch and repeats the others.
    never_better = ("callbacks.checkpoint.init_args.monitor=epoch", "callbacks.checkpoint.init_args.mode=min")
    results = fit("standard", tmp_path, "trainer.max_epochs=3", *never_better)
    assert state(Path(results.run))[1] == 6


def test_a_run_that_was_moved_can_still_be_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = fit("standard", Path("runs"))
    moved = Path(results.run).rename(tmp_path / "moved")
    again = run.evaluate(moved)
    assert again is not None
    assert again.metrics == results.metrics
    assert Path(str(again.checkpoint)).resolve() == moved / "checkpoints" / "best.ckpt"


def test_a_run_that_was_killed_in_its_test_is_tested_with_its_best_weights(tmp_path: Path) -> None:
    # The first epoch stays the best, whatever happens: its number is monitored.
    never_better = ("callbacks.checkpoint.init_args.monitor=epoch", "callbacks.checkpoint.init_args.mode=min")
    folder = Path(fit("standard", tmp_path, *never_better, "trainer.max_epochs=2").run)
    (folder / "results.json").unlink()
    again = run.evaluate(folder)
    assert again is not None
    assert Path(str(again.checkpoint)) == folder / "checkpoints" / "best.ckpt"
    (folder / "checkpoints" / "best.ckpt").unlink()
    again = run.evaluate(folder)
    assert again is not None
    assert Path(str(again.checkpoint)) == folder / "checkpoints" / "last.ckpt"


def state(folder: Path) -> tuple[int, int]:
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["epoch"], checkpoint["global_step"]


def test_a_folder_without_a_checkpoint_cannot_be_resumed_and_the_error_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "standard" / "version_0"
    folder.mkdir(parents=True)
    with pytest.raises(RecipeError):
        run.fit("standard", resume=folder)
    (folder / run.RAW).write_text(compose("standard").raw_yaml)
    with pytest.raises(RecipeError, match="nothing to go on with"):
        run.fit("standard", resume=folder)
    with pytest.raises(RecipeError, match="nothing to go on with"):
        run.evaluate(folder)
