"""The command line: ``lightning-robust fit | test | recipes``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_robust.run import Results

__all__ = ["main"]

OVERRIDES = "changes, e.g. trainer.max_epochs=5 vars.eps=8/255 callbacks.ood=null"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-robust", description="Train and test robust PyTorch Lightning models from recipes."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    fit = commands.add_parser("fit", help="train a recipe, test its best weights")
    fit.add_argument("recipe", help="name of a shipped recipe (see `recipes`) or path of a YAML file")
    fit.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    fit.add_argument("--output", default="runs", help="folder for all runs (default: %(default)s)")
    fit.add_argument(
        "--resume", nargs="?", const="", metavar="RUN", help="go on with a killed run (default: the newest)"
    )
    fit.add_argument(
        "--beside", metavar="RECIPE", help="show this recipe's results in the table too; trained first if need be"
    )
    fit.add_argument(
        "--dry-run", action="store_true", help="build everything, print the resolved recipe, train nothing"
    )
    test = commands.add_parser("test", help="test a run again, for instance with other attacks")
    test.add_argument("run", help="folder of a run, or a recipe's name for its newest run")
    test.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    test.add_argument("--output", default="runs", help="folder for all runs (default: %(default)s)")
    test.add_argument("--checkpoint", help="weights to test (default: the run's best)")
    recipes = commands.add_parser("recipes", help="list the shipped recipes, or print one")
    recipes.add_argument("recipe", nargs="?", help="print this one, merged with its bases")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    arguments, more = parser.parse_known_args(argv)
    if more:  # argparse ends a list of overrides at the first option; ours may go on behind it
        if not hasattr(arguments, "overrides") or any(word.startswith("-") for word in more):
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        arguments.overrides += more
    if "=" in (getattr(arguments, "resume", None) or ""):  # `--resume vars.eps=0.1`: no folder was meant
        arguments.overrides, arguments.resume = [*arguments.overrides, arguments.resume], ""
    # Imported late: `--help` should not wait for torch.
    from lightning_robust.recipe import RecipeError

    try:
        return {"fit": _fit, "test": _test, "recipes": _recipes}[arguments.command](arguments)
    except RecipeError as error:
        print(f"lightning-robust: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _fit(arguments: argparse.Namespace) -> int:
    from lightning_robust import run
    from lightning_robust.recipe import RecipeError, compose

    name = run.run_name(arguments.recipe)
    resume: Path | None = None
    if arguments.resume is not None:
        resume = Path(arguments.resume) if arguments.resume else run.latest(arguments.output, name)
        if resume is None:
            raise RecipeError(f"--resume: there is no run of {name!r} in {arguments.output}.")
    if arguments.dry_run:
        run.fit(arguments.recipe, arguments.overrides, output=arguments.output, resume=resume, dry=True)
        print(compose(arguments.recipe if resume is None else resume / run.RAW, arguments.overrides).resolved_yaml)
        return 0
    beside = _beside(arguments) if arguments.beside else None
    results = run.fit(arguments.recipe, arguments.overrides, output=arguments.output, resume=resume)
    if results is None:
        print("Trained; there is no test data (or test_step) to report on.")
        return 0
    columns = [results] if beside is None else [results, beside]
    run.write_table(columns, results.run)
    print(f"\n{_aligned(run.table(columns))}\n")
    print(f"run          {results.run}  (results.json, results.md, table.json, recipe.yaml)")
    print(f"checkpoint   {results.checkpoint}")
    print(f"tensorboard  {run.tensorboard_command(arguments.output)}")
    return 0


def _beside(arguments: argparse.Namespace) -> Results | None:
    """Results of the recipe to compare with, under the same variables, seed, data and trainer."""
    from lightning_robust import run
    from lightning_robust.recipe import compose

    shared = [o for o in arguments.overrides if o.split("=")[0].split(".")[0] in ("seed", "data", "trainer", "model")]
    known = compose(arguments.beside).resolved.get("vars") or {}
    shared += [
        o for o in arguments.overrides if o.startswith("vars.") and o.split("=")[0].removeprefix("vars.") in known
    ]
    wanted = compose(arguments.beside, shared).resolved
    done = run.latest(arguments.output, run.run_name(arguments.beside), finished=True)
    if done is not None:
        results = run.Results.read(done)
        if results.resolved == wanted:
            return results
    print(f"First {arguments.beside!r}, to compare with.")
    return run.fit(arguments.beside, shared, output=arguments.output)


def _test(arguments: argparse.Namespace) -> int:
    from lightning_robust import run
    from lightning_robust.recipe import RecipeError

    folder: Path | None = Path(arguments.run)
    if not Path(arguments.run, run.RAW).is_file():
        folder = run.latest(arguments.output, arguments.run)
    if folder is None:
        raise RecipeError(f"{arguments.run!r} is neither a run's folder nor a recipe with a run in {arguments.output}.")
    results = run.evaluate(folder, arguments.overrides, checkpoint=arguments.checkpoint)
    if results is None:
        raise RecipeError(f"{folder}: the recipe has no test data, or its module no test_step.")
    print(f"\n{_aligned(run.table([results]))}\n\ncheckpoint   {results.checkpoint}")
    return 0


def _recipes(arguments: argparse.Namespace) -> int:
    from lightning_robust.recipe import available, compose

    if arguments.recipe:
        print(compose(arguments.recipe).raw_yaml)
        return 0
    shipped = available()
    width = max(map(len, shipped), default=0)
    for name in shipped:
        print(f"{name:<{width}}  {compose(name).resolved.get('about', '')}")
    return 0


def _aligned(table: str) -> str:
    """A Markdown table with columns of one width, for the terminal."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    widths = [max(len(row[i]) for j, row in enumerate(rows) if j != 1) for i in range(len(rows[0]))]
    lines = []
    for j, row in enumerate(rows):
        cells = (
            ["-" * w for w in widths]
            if j == 1
            else [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        )
        lines.append("  ".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
