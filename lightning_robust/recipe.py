"""Recipes: a YAML file and overrides to one resolved, validated run (OmegaConf composes, jsonargparse builds)."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_robust.recipe_keys import KEYS, RecipeError, check, imported, namespace_of, unknown

__all__ = ["KEYS", "Recipe", "RecipeError", "available", "compose", "instantiate"]

_FRACTION = re.compile(r"\s*([-+]?[\d.]+)\s*/\s*([\d.]+)\s*")


def _number(value: Any) -> Any:
    """``"8/255"`` and other fractions as the number they are; everything else unchanged."""
    match = _FRACTION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    try:
        return float(match[1]) / float(match[2])
    except (ValueError, ZeroDivisionError) as error:
        raise RecipeError(f"{value!r} is no fraction ({error}); write 8/255 or a number.") from error


def _register_resolvers() -> None:
    # Accepts numbers as well, so that `${frac:${vars.eps}}` works for 0.2 and for 8/255.
    # OmegaConf 2.4 gave the function the name of an older one, which 2.3 still has and which takes other arguments.
    renamed = "replace" in inspect.signature(OmegaConf.register_resolver).parameters
    register = OmegaConf.register_resolver if renamed else OmegaConf.register_new_resolver
    register("frac", lambda value: float(_number(value)), replace=True)


@dataclass(frozen=True)
class Recipe:
    """A composed recipe.

    Attributes:
        name: Of the file.
        raw: Bases, the recipe and overrides merged, interpolations left in.
        resolved: Plain dicts, lists and numbers; what is built.
    """

    name: str
    raw: DictConfig
    resolved: dict[str, Any]

    @property
    def raw_yaml(self) -> str:
        """The merged recipe as YAML, interpolations left in."""
        return str(OmegaConf.to_yaml(self.raw))

    @property
    def resolved_yaml(self) -> str:
        """The recipe as it is built, as YAML."""
        return str(OmegaConf.to_yaml(OmegaConf.create(self.resolved)))


def folders() -> list[Path]:
    """Where shipped recipes are: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).parent
    return [folder for folder in (here / "recipes", here.parent / "recipes") if folder.is_dir()][:1]


def available() -> dict[str, Path]:
    """Names of the shipped recipes (``standard``, ``adversarial/trades``) and their files."""
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for folder in folders()
        for path in sorted(folder.rglob("*.yaml"))
    }


def compose(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Merge a recipe with its bases and ``key=value`` overrides, resolve it once and check every key.

    Args:
        recipe: Name of a shipped recipe or path of a YAML file.
        overrides: Dotted keys: ``trainer.max_epochs=5``, ``vars.eps=8/255``, ``callbacks.robust=null``.

    Returns:
        The raw and the resolved recipe. Callbacks that are null are gone from the resolved one.

    Raises:
        RecipeError: For unknown recipes, keys and classes, with the nearest valid name.

    Example:
        >>> compose("quickstart", ["vars.eps=8/255"]).resolved["vars"]["eps"]
        0.03137254901960784
    """
    _register_resolvers()
    path = _find(str(recipe), Path.cwd())
    merged = _with_bases(path.resolve(), ())
    merged.pop("base", None)  # merged in; what is saved beside a run stands on its own
    changes = _overrides(overrides)
    for key in ("vars", "callbacks", "trainer"):
        for content in (merged.get(key), changes.get(key)):
            if content is not None and not isinstance(content, DictConfig):
                raise RecipeError(f"{key}: expected names and values, got {content!r}.")
    known = {key: [str(name) for name in merged.get(key) or {}] for key in ("vars", "callbacks")}
    for name in changes.get("vars") or {}:
        if name not in known["vars"]:
            raise unknown(
                f"vars.{name}", [f"vars.{v}" for v in known["vars"]], f"recipe {path.stem!r} has no such variable"
            )
    for name, value in (changes.get("callbacks") or {}).items():
        if value is None and name not in known["callbacks"]:
            valid = [f"callbacks.{v}" for v in known["callbacks"]]
            raise unknown(f"callbacks.{name}", valid, f"recipe {path.stem!r} has no such callback to switch off")
    merged = _merge(merged, changes)
    try:
        plain = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{path.name}: {error}") from error
    resolved: dict[str, Any] = _numbers(plain)
    resolved["callbacks"] = {name: c for name, c in (resolved.get("callbacks") or {}).items() if c is not None}
    check(resolved)
    return Recipe(path.stem, merged, resolved)


def instantiate(recipe: Recipe, folder: Path, *, log: bool = True) -> tuple[Any, Any, Any]:
    """Build trainer, module and data module.

    Args:
        recipe: A composed recipe.
        folder: Of the run; TensorBoard logs there unless the recipe names a logger of its own.
        log: False for no logger at all.

    Returns:
        ``(trainer, module, datamodule)``; the data module is None if the recipe has no ``data``.

    Raises:
        RecipeError: If a value does not fit what it is for; jsonargparse says how.
    """
    resolved = copy.deepcopy(recipe.resolved)  # jsonargparse writes into nested dicts
    model = imported(resolved["model"]["class_path"], "model.class_path")
    lightning = namespace_of(model)
    parts = {"save_dir": str(folder.parent.parent), "name": folder.parent.name, "version": _version(folder.name)}
    logger = {"class_path": f"{lightning}.loggers.TensorBoardLogger", "init_args": parts}
    trainer = {"default_root_dir": str(folder), "logger": logger, **(resolved.get("trainer") or {})}
    if not log:
        trainer["logger"] = False
    trainer["callbacks"] = list(resolved["callbacks"].values())
    arguments = {"seed_everything": resolved.get("seed", 0), "model": resolved["model"], "trainer": trainer}
    if resolved.get("data") is not None:
        arguments["data"] = resolved["data"]
    cli = importlib.import_module(f"{lightning}.cli")
    core = importlib.import_module(lightning)

    class Built(cli.LightningCLI):  # type: ignore[misc, name-defined]  # the class is chosen at run time
        def instantiate_trainer(self, **more: Any) -> Any:
            # For `int | float`, jsonargparse makes 1 into 1.0: one batch would become all of them.
            whole = {name: value for name, value in trainer.items() if type(value) is int}
            return super().instantiate_trainer(**whole, **more)

    with _no_arguments(), warnings.catch_warnings():
        # jsonargparse announces its next major version; ours is capped below it.
        warnings.filterwarnings("ignore", category=FutureWarning, module="jsonargparse")
        try:
            built = Built(
                core.LightningModule,
                core.LightningDataModule if "data" in arguments else None,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=None,  # it refuses a folder that has a configuration: no run could be resumed
                run=False,
                args=arguments,
                parser_kwargs={"exit_on_error": False},
            )
        except (SystemExit, ValueError, TypeError, KeyError) as error:
            raise RecipeError(f"recipe {recipe.name!r} cannot be built: {error}") from error
        except Exception as error:
            if type(error).__name__ in ("ArgumentError", "ParserError", "MisconfigurationException"):
                raise RecipeError(f"recipe {recipe.name!r} cannot be built: {error}") from error
            raise
    return built.trainer, built.model, built.datamodule if "data" in arguments else None


def _version(name: str) -> int | str:
    # As a number it reads well in Lightning's progress bar; the folder is version_N either way.
    digits = name.removeprefix("version_")
    return int(digits) if digits.isdigit() and name != digits else name


# -- composing -------------------------------------------------------------------------------------------------------


def _find(name: str, beside: Path) -> Path:
    for path in (beside / name, beside / f"{name}.yaml", Path(name)):
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return path
    shipped = available()
    if name in shipped:
        return shipped[name]
    raise unknown(name, list(shipped), "there is no such recipe; give a file or one of " + ", ".join(shipped))


def _with_bases(path: Path, above: tuple[Path, ...]) -> DictConfig:
    if path in above:
        raise RecipeError(f"{path.name} is its own base: {' -> '.join(p.name for p in (*above, path))}.")
    try:
        own = OmegaConf.load(path)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise RecipeError(f"{path.name} is no readable YAML: {error}") from error
    if not isinstance(own, DictConfig):
        raise RecipeError(f"{path} must hold keys ({', '.join(KEYS)}), got {type(own).__name__}.")
    bases = own.get("base") or []
    merged = OmegaConf.create({})
    for base in [bases] if isinstance(bases, str) else bases:
        merged = _merge(merged, _with_bases(_find(base, path.parent).resolve(), (*above, path)))
    return _merge(merged, own)


def _overrides(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        if "=" not in override:
            raise RecipeError(
                f"overrides read key=value, e.g. trainer.max_epochs=5 or callbacks.robust=null; got {override!r}."
            )
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise RecipeError(f"the overrides {' '.join(overrides)} are no readable YAML: {error}") from error


def _merge(under: DictConfig, over: DictConfig) -> DictConfig:
    under = under.copy()
    _drop_stale_arguments(under, over)
    merged = OmegaConf.merge(under, over)
    if not isinstance(merged, DictConfig):
        raise RecipeError("a recipe is a mapping of keys.")
    return merged


def _drop_stale_arguments(under: Any, over: Any) -> None:
    """Another class has other arguments: those of the old one must not be merged into it."""
    if not isinstance(under, DictConfig) or not isinstance(over, DictConfig):
        return
    ours, theirs = under._get_node("class_path"), over._get_node("class_path")
    if ours is not None and theirs is not None and ours != theirs:
        under.pop("init_args", None)
    for name in over:
        # Nodes, not values: interpolations are resolved once, at the end.
        _drop_stale_arguments(under._get_node(name), over._get_node(name))


def _numbers(node: Any) -> Any:
    if isinstance(node, dict):
        return {str(name): _numbers(child) for name, child in node.items()}
    return [_numbers(child) for child in node] if isinstance(node, list) else _number(node)


@contextlib.contextmanager
def _no_arguments() -> Iterator[None]:
    """LightningCLI warns if it is given arguments while the command line has some too."""
    given, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = given
