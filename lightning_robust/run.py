"""One run of a recipe: fit, keep the best weights, report on held-out data, write down what was measured."""

from __future__ import annotations

import json
import pickle
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_robust import _version, report
from lightning_robust.attach.base import sections, show_text
from lightning_robust.attach.checkpoint import rewrite
from lightning_robust.attach.step import defines
from lightning_robust.recipe import Recipe, RecipeError, available, compose, instantiate

__all__ = ["Results", "evaluate", "fit", "latest", "run_name", "table", "write_table"]

RAW, RESOLVED, RESULTS = "recipe.yaml", "recipe.resolved.yaml", "results.json"


@dataclass(frozen=True)
class Results:
    """What a run leaves in ``results.json``.

    Attributes:
        recipe: Name of the recipe.
        run: Folder of the run.
        checkpoint: The weights that the metrics belong to.
        metrics: Everything logged on the test data, and how saliency drifted in training, by log key.
        seed: Of the run.
        seconds: Wall time of training and testing.
        resolved: The recipe as it was built.
    """

    recipe: str
    run: str
    checkpoint: str | None
    metrics: dict[str, float]
    seed: int | None
    seconds: float
    resolved: dict[str, Any]

    def write(self) -> None:
        """Write ``results.json`` into the run's folder."""
        content = {**vars(self), "written_by": f"lightning_robust {_version.__version__}"}
        content.pop("run")  # where the file lies
        if self.checkpoint is not None and Path(self.checkpoint).is_relative_to(self.run):
            content["checkpoint"] = str(Path(self.checkpoint).relative_to(self.run))  # a run may be moved
        (Path(self.run) / RESULTS).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def read(cls, run: Path) -> Results:
        """Read what :meth:`write` wrote."""
        content = json.loads((run / RESULTS).read_text())
        content.pop("written_by", None)
        if content["checkpoint"] is not None:
            content["checkpoint"] = str(run / content["checkpoint"])
        return cls(**content, run=str(run))


def fit(
    name: str | Path,
    overrides: Sequence[str] = (),
    *,
    output: str | Path = "runs",
    resume: str | Path | None = None,
    dry: bool = False,
) -> Results | None:
    """Train a recipe and test its best weights.

    Args:
        name: A shipped recipe or a YAML file.
        overrides: ``key=value`` changes.
        output: Runs are written to ``output/recipe/version_N``.
        resume: Folder of a killed run to go on with, from its last checkpoint.
        dry: Build everything, train nothing.

    Returns:
        The results, or None where nothing was trained or there is no test data.

    Raises:
        RecipeError: If the recipe cannot be built, or there is nothing to resume from.
    """
    start = time.monotonic()
    recipe = compose(name if resume is None else Path(resume) / RAW, overrides)
    stem = run_name(name)
    folder = Path(resume) if resume is not None else _next_version(Path(output) / stem)
    checkpoint = _last_checkpoint(folder) if resume is not None else None
    trainer, module, data = instantiate(recipe, folder)
    if dry:
        return None
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RAW).write_text(recipe.raw_yaml)
        (folder / RESOLVED).write_text(recipe.resolved_yaml)
        for tag, text in {"recipe/raw": recipe.raw_yaml, "recipe/resolved": recipe.resolved_yaml}.items():
            show_text(trainer, tag, f"```yaml\n{text}```")
    if trainer.max_epochs == 0:
        calibrated = _calibrate(trainer, module, data, recipe, folder)
        return _report(trainer, module, data, recipe, stem, folder, calibrated, start)
    trainer.fit(module, datamodule=data, ckpt_path=None if checkpoint is None else str(checkpoint))
    drift = {key: float(value) for key, value in trainer.callback_metrics.items() if _area(key) == "saliency"}
    best = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
    return _report(trainer, module, data, recipe, stem, folder, best, start, drift)


def _calibrate(trainer: Any, module: Any, data: Any, recipe: Recipe, folder: Path) -> str:
    """Without training: measure an existing checkpoint, and leave a copy of it with what was measured inside."""
    path = (recipe.resolved.get("vars") or {}).get("checkpoint")
    if not path or not Path(path).is_file():
        raise RecipeError(
            f"this recipe trains nothing (trainer.max_epochs=0), it measures a checkpoint: vars.checkpoint=best.ckpt, "
            f"and model.class_path= and data.class_path= of what it belongs to; got vars.checkpoint={path!r}."
        )
    with _without_its_callbacks():
        trainer.validate(module, datamodule=data, ckpt_path=str(path), verbose=False)
    measured = sections(trainer)
    step = int(torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("global_step", 0))
    for name in [name for name in measured if name.split(".")[0] == "calibration"]:
        if "temperature" in measured[name]:
            measured[name]["fit_step"] = step  # the weights are those of this step, whatever the Trainer has counted
    copy = folder / "checkpoints" / "calibrated.ckpt"
    if trainer.is_global_zero:
        rewrite(path, measured, _version.__version__, to=copy)
    trainer.strategy.barrier()
    return str(copy)


def evaluate(run: str | Path, overrides: Sequence[str] = (), *, checkpoint: str | None = None) -> Results | None:
    """Test a finished (or killed) run again, for instance with other attacks.

    Args:
        run: Folder of the run.
        overrides: ``key=value`` changes of its recipe.
        checkpoint: Weights to test; by default those that the run's results belong to, else its best ones so far, else
            its last ones.
    """
    start, folder = time.monotonic(), Path(run)
    recipe = compose(folder / RAW, overrides)
    known = Results.read(folder) if (folder / RESULTS).is_file() else None
    if checkpoint is None:
        checkpoint = (known and known.checkpoint) or str(_best_checkpoint(folder))
    drift = {key: value for key, value in (known.metrics if known else {}).items() if _area(key) == "saliency"}
    trainer, module, data = instantiate(recipe, folder, log=False)  # the curves of the run stay as they are
    label = folder.parent.name if known is None else known.recipe
    return _report(trainer, module, data, recipe, label, folder, checkpoint, start, drift, write=False)


def _report(
    trainer: Any,
    module: Any,
    data: Any,
    recipe: Recipe,
    name: str,
    folder: Path,
    checkpoint: str | None,
    start: float,
    drift: dict[str, float] | None = None,
    write: bool = True,
) -> Results | None:
    if not defines(module, "test_step") or not any(
        part is not None and defines(part, "test_dataloader") for part in (data, module)
    ):
        return None
    with _without_its_callbacks():
        trainer.test(module, datamodule=data, ckpt_path=checkpoint, verbose=False)
    tested = {key: float(value) for key, value in trainer.callback_metrics.items() if "test" in key.split("/")[:2]}
    seed = recipe.resolved.get("seed", 0)
    tested |= drift or {}
    results = Results(name, str(folder), checkpoint, tested, seed, round(time.monotonic() - start, 1), recipe.resolved)
    if write and trainer.is_global_zero:
        results.write()
        write_table([results], folder)
    return results


def table(columns: Sequence[Results]) -> str:
    """Results side by side as a Markdown table; see :func:`lightning_robust.report.table`."""
    return report.table([(result.recipe, result.metrics) for result in columns])


def write_table(columns: Sequence[Results], folder: str | Path) -> None:
    """The table as ``results.md``, and its cells by run and label as ``table.json``."""
    (Path(folder) / "results.md").write_text(table(columns) + "\n")
    cells = [{"recipe": result.recipe, **report.cells(result.metrics)} for result in columns]
    (Path(folder) / "table.json").write_text(json.dumps(cells, indent=2) + "\n")


def run_name(recipe: str | Path) -> str:
    """What the runs of a recipe are called: as it is shipped (``adversarial/madry``), or the file's own name.

    Example:
        >>> run_name("adversarial/madry"), run_name("my/recipes/mine.yaml")
        ('adversarial/madry', 'mine')
    """
    name = Path(str(recipe)).as_posix()
    return name if name in available() else Path(name).stem


def latest(output: str | Path, name: str, *, finished: bool = False) -> Path | None:
    """The newest run of a recipe, or None.

    Args:
        output: Folder of all runs.
        name: The recipe's name.
        finished: Only runs that have results.
    """
    runs = sorted((Path(output) / name).glob("version_*"), key=_version_of)
    runs = [run for run in runs if (run / (RESULTS if finished else RAW)).is_file()]
    return runs[-1] if runs else None


def tensorboard_command(output: str | Path) -> str:
    """What to type to look at the runs."""
    beside = Path(sys.executable).parent / "tensorboard"
    try:
        program = str(beside.relative_to(Path.cwd()))
    except ValueError:
        program = "tensorboard"
    return f"{program} --logdir {output}"


@contextmanager
def _without_its_callbacks() -> Iterator[None]:
    """Lightning asks for callbacks and folder of the run that saved a checkpoint; who measures it has others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The dirpath has changed")
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
        yield


def _area(key: str) -> str:
    return key.split("/")[0].split(".")[0]


def _version_of(run: Path) -> int:
    digits = run.name.removeprefix("version_")
    return int(digits) if digits.isdigit() else -1


def _next_version(folder: Path) -> Path:
    taken = [_version_of(run) for run in folder.glob("version_*")]
    return folder / f"version_{max(taken, default=-1) + 1}"


def _best_checkpoint(folder: Path) -> Path:
    """Of a run that was killed before it wrote its results: what its last checkpoint says was the best one."""
    last = _last_checkpoint(folder)
    try:
        states = torch.load(last, map_location="cpu", weights_only=True, mmap=True).get("callbacks", {}).values()
    except pickle.UnpicklingError:  # a callback of the user's keeps objects of its own in there
        return last
    watched = [state for state in states if isinstance(state, dict) and state.get("monitor") is not None]
    best = (folder / "checkpoints" / Path(str(state.get("best_model_path", ""))).name for state in watched)
    return next((path for path in best if path.is_file()), last)


def _last_checkpoint(folder: Path) -> Path:
    found = sorted((folder / "checkpoints").glob("last*.ckpt"), key=lambda p: p.stat().st_mtime)
    found = found or sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise RecipeError(
            f"{folder}: nothing to go on with, expected a checkpoint in {folder / 'checkpoints'}. A run can be resumed "
            "once its first validation has ended; give it a ModelCheckpoint without a monitor."
        )
    return found[-1]
