"""Recipes: a YAML file and overrides to one resolved, validated run (OmegaConf composes, jsonargparse builds)."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

__all__ = ["KEYS", "Recipe", "RecipeError", "available", "compose", "instantiate"]

KEYS = ("about", "base", "vars", "seed", "model", "data", "callbacks", "trainer")
_FRACTION = re.compile(r"\s*([-+]?[\d.]+)\s*/\s*([\d.]+)\s*")


class RecipeError(ValueError):
    """A recipe cannot be run; the message names the key and, if there is one, the nearest valid key."""


def _number(value: Any) -> Any:
    """``"8/255"`` and other fractions as the number they are; everything else unchanged."""
    match = _FRACTION.fullmatch(value) if isinstance(value, str) else None
    return float(match[1]) / float(match[2]) if match else value


def _register_resolvers() -> None:
    # Accepts numbers as well, so that `${frac:${vars.eps}}` works for 0.2 and for 8/255.
    # OmegaConf 2.4 renamed the function; 2.3 knows the old name only.
    register = getattr(OmegaConf, "register_resolver", None) or OmegaConf.register_new_resolver
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
        overrides: Dotted keys: ``trainer.max_epochs=5``, ``vars.eps=8/255``, ``callbacks.ood=null``.

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
    merged = _with_bases(path, ())
    changes = _overrides(overrides)
    known = OmegaConf.to_container(merged, resolve=False)
    for name in changes.get("vars") or {}:
        if name not in ((known.get("vars") or {}) if isinstance(known, dict) else {}):
            raise _unknown(
                f"vars.{name}",
                [f"vars.{v}" for v in (merged.get("vars") or {})],
                f"recipe {path.stem!r} has no such variable",
            )
    merged = _merge(merged, changes)
    try:
        plain = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{path.name}: {error}") from error
    resolved: dict[str, Any] = _numbers(plain)
    resolved.pop("base", None)
    resolved["callbacks"] = {name: c for name, c in (resolved.get("callbacks") or {}).items() if c is not None}
    _check(resolved)
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
    resolved = recipe.resolved
    model = _imported(resolved["model"]["class_path"], "model.class_path")
    lightning = _namespace(model)
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
    with _no_arguments(), warnings.catch_warnings():
        # jsonargparse announces its next major version; ours is capped below it.
        warnings.filterwarnings("ignore", category=FutureWarning, module="jsonargparse")
        try:
            built = cli.LightningCLI(
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
    for path in (Path(name), beside / name, beside / f"{name}.yaml"):
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return path
    shipped = available()
    if name in shipped:
        return shipped[name]
    raise _unknown(name, list(shipped), "there is no such recipe; give a file or one of " + ", ".join(shipped))


def _with_bases(path: Path, above: tuple[Path, ...]) -> DictConfig:
    if path in above:
        raise RecipeError(f"{path.name} is its own base: {' -> '.join(p.name for p in (*above, path))}.")
    own = OmegaConf.load(path)
    if not isinstance(own, DictConfig):
        raise RecipeError(f"{path} must hold keys ({', '.join(KEYS)}), got {type(own).__name__}.")
    bases = own.get("base") or []
    merged = OmegaConf.create({})
    for base in [bases] if isinstance(bases, str) else bases:
        merged = _merge(merged, _with_bases(_find(base, path.parent), (*above, path)))
    return _merge(merged, own)


def _overrides(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        if "=" not in override:
            raise RecipeError(
                f"overrides read key=value, e.g. trainer.max_epochs=5 or callbacks.robust=null; got {override!r}."
            )
    return OmegaConf.from_dotlist(list(overrides))


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


# -- checking --------------------------------------------------------------------------------------------------------


def _unknown(key: str, valid: Sequence[str], why: str) -> RecipeError:
    near = difflib.get_close_matches(key, valid, 1, cutoff=0.5)
    return RecipeError(f"{key}: {why}." + (f" Did you mean {near[0]!r}?" if near else f" Valid: {', '.join(valid)}."))


def _check(resolved: Mapping[str, Any]) -> None:
    for key in resolved:
        if key not in KEYS:
            raise _unknown(key, KEYS, "a recipe has no such key")
    if not resolved.get("model"):
        raise RecipeError("model: a recipe needs a model: {class_path: my_package.MyModule, init_args: {...}}.")
    model = _check_component("model", resolved["model"])
    if resolved.get("data") is not None:
        _check_component("data", resolved["data"])
    for name, callback in resolved["callbacks"].items():
        _check_component(f"callbacks.{name}", callback)
    trainer = importlib.import_module(_namespace(model)).Trainer
    valid = [name for name in inspect.signature(trainer.__init__).parameters if name not in ("self", "callbacks")]
    for key in resolved.get("trainer") or {}:
        if key == "callbacks":
            raise RecipeError(
                "trainer.callbacks: callbacks have a key of their own, so that they can be named: callbacks: "
                "{name: {class_path: ...}}."
            )
        if key not in valid:
            raise _unknown(f"trainer.{key}", [f"trainer.{v}" for v in valid], "Trainer has no such argument")


def _check_component(key: str, node: Any) -> Any:
    if not isinstance(node, Mapping) or "class_path" not in node:
        raise RecipeError(f"{key}: expected {{class_path: package.Class, init_args: {{...}}}}, got {node!r}.")
    for name in node:
        if name not in ("class_path", "init_args"):
            raise _unknown(
                f"{key}.{name}",
                [f"{key}.class_path", f"{key}.init_args", f"{key}.init_args.{name}"],
                "arguments of a class stand under init_args",
            )
    built = _imported(str(node["class_path"]), f"{key}.class_path")
    parameters = inspect.signature(built).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return built  # jsonargparse follows **kwargs through the source; we do not
    valid = [f"{key}.init_args.{name}" for name in parameters]
    for name, value in (node.get("init_args") or {}).items():
        if name not in parameters:
            raise _unknown(f"{key}.init_args.{name}", valid, f"{built.__name__} has no such argument")
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(child, Mapping) and "class_path" in child:
                _check_component(f"{key}.init_args.{name}" + (f"[{i}]" if isinstance(value, list) else ""), child)
    return built


def _imported(class_path: str, key: str) -> Any:
    module, _, name = class_path.rpartition(".")
    try:
        home = importlib.import_module(module)
    except (ModuleNotFoundError, ValueError) as error:
        raise RecipeError(
            f"{key}: cannot import {module or class_path!r} ({error}). Is its package installed, or its folder "
            f"on PYTHONPATH?"
        ) from error
    if not hasattr(home, name):
        raise _unknown(
            class_path, [f"{module}.{n}" for n in dir(home) if not n.startswith("_")], f"{key} names no class"
        )
    return getattr(home, name)


def _namespace(model: Any) -> str:
    """Which Lightning a module belongs to; the two do not mix."""
    if importlib.util.find_spec("lightning") is not None:
        from lightning.pytorch import LightningModule

        if inspect.isclass(model) and issubclass(model, LightningModule):
            return "lightning.pytorch"
    return "pytorch_lightning"


@contextlib.contextmanager
def _no_arguments() -> Iterator[None]:
    """LightningCLI warns if it is given arguments while the command line has some too."""
    given, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = given
