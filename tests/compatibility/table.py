"""All shapes of user code, fits of them with callbacks, and the table that documents them."""

from __future__ import annotations

import functools
import importlib
import inspect
import pathlib
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from compatibility.common import GROUPS, Shape
from torch import Tensor, nn

from lightning_robust import (
    PGD,
    AdversarialTraining,
    CalibrationMonitor,
    CorruptionMonitor,
    InputGradientPenalty,
    OODMonitor,
    RobustAccuracy,
    SaliencyRegularization,
    SaliencySnapshots,
    TemperatureScaling,
    ThreatModel,
)
from lightning_robust.attach.batches import leaves
from lightning_robust.attach.watcher import is_unheard

SHAPES = sorted(path.stem for path in (pathlib.Path(__file__).parent / "shapes").glob("*.py"))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "max_epochs": 1,
    "num_sanity_val_steps": 0,
}


def code_of(name: str) -> Any:
    """The user's file: a module class, loaders (or a DataModule), and what is declared about them."""
    return importlib.import_module(f"compatibility.shapes.{name}")


def shape_of(name: str) -> Shape:
    return code_of(name).SHAPE


@dataclass
class Run:
    """One fit, and what was left of it.

    Attributes:
        module: The module afterwards.
        trainer: Its Trainer.
        start: The weights before.
        seen: The tensors of the batch that the user's own training step got, by number of the batch.
        caught: Texts of the declared warnings.
        error: What the fit ended with.
    """

    module: Any
    trainer: Any
    start: dict[str, Tensor]
    seen: dict[int, dict[Any, Tensor]]
    caught: list[str]
    error: Exception | None
    reference: Callable[[], Run] | None = None  # the same fit without callbacks

    def metrics(self) -> dict[str, float]:
        return {key: float(value) for key, value in self.trainer.callback_metrics.items()}

    def traces(self) -> dict[str, Any]:
        """All that a callback could leave on a module: attributes, counters, hooks, modes, gradients wanted."""
        return {
            name: {
                "attributes": {key: _measured(key, value) for key, value in vars(part).items()},
                "hooks": [len(getattr(part, hooks)) for hooks in HOOKS],
                "wanted": {key: p.requires_grad for key, p in part.named_parameters(recurse=False)},
            }
            for name, part in self.module.named_modules()
        }


def _measured(key: str, value: Any) -> Any:
    """A value if it is a plain one, the length of a container, nothing else."""
    if isinstance(value, (bool, int, str)) and not key.endswith("_id"):
        return value
    return len(value) if isinstance(value, (list, dict, deque)) else None


def weights(module: nn.Module) -> dict[str, Tensor]:
    state = {key: value.detach().clone() for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    return {key: value for key, value in state.items() if not isinstance(value, nn.parameter.UninitializedTensorMixin)}


def fit(name: str, *callbacks: Any, validation: bool = True, **settings: Any) -> Run:
    """A fresh module of one shape, fitted on its two batches; errors are kept, warnings nobody declared are raised."""
    code, shape = code_of(name), shape_of(name)
    pl.seed_everything(0, verbose=False)
    module = code.Module()
    lightning = importlib.import_module(shape.namespace)
    settings = {**QUIET, **shape.trainer, **settings, **({} if validation else {"limit_val_batches": 0})}
    trainer = lightning.Trainer(callbacks=list(callbacks), **settings)
    data = code.data() if hasattr(code, "data") else None
    loaders = () if data is not None else (code.train_loader(), code.val_loader())
    error, seen = None, {}
    pl.seed_everything(1, verbose=False)
    start = weights(module)
    with _declared(shape) as caught, _recorded(type(module), seen):
        try:
            trainer.fit(module, *loaders, datamodule=data)
        except Exception as raised:  # compared with what is declared
            error = raised
    sanity = settings["num_sanity_val_steps"]
    reference = functools.partial(plain, name, validation, sanity)
    return Run(module, trainer, start, seen, [str(w.message) for w in caught], error, reference)


@functools.cache
def plain(name: str, validation: bool = True, sanity: int = 0) -> Run:
    """The same fit without any callback: user code that trains, and what it does by itself."""
    return fit(name, validation=validation, num_sanity_val_steps=sanity)


@contextmanager
def _declared(shape: Shape) -> Iterator[list[Any]]:
    with warnings.catch_warnings(record=True) as caught:
        for pattern in (*shape.says.values(), *shape.warns, *shape.monitors_warn, *shape.noise):
            warnings.filterwarnings("always", f"(?s).*{pattern}")
        yield caught  # all others are errors, as in the whole suite


@contextmanager
def _recorded(kind: Any, seen: dict[int, dict[Any, Tensor]]) -> Iterator[None]:
    """Note what the user's own step is given, where Lightning means it: not while it is read."""
    own: Callable[..., Any] = vars(kind).get("training_step") or kind.training_step

    @functools.wraps(own)
    def training_step(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if self.trainer.training and not is_unheard():
            found = {path: leaf.detach().clone() for path, leaf in leaves(batch) if isinstance(leaf, Tensor)}
            seen.setdefault(self.trainer.fit_loop.total_batch_idx, found)
        return own(self, batch, *args, **kwargs)

    # Lightning looks below one wrapper only, and the user's code may have one.
    training_step.__wrapped__ = inspect.unwrap(own)
    inherited = "training_step" not in vars(kind)
    kind.training_step = training_step
    try:
        yield
    finally:
        if inherited:
            del kind.training_step
        else:
            kind.training_step = own


# -- callbacks -------------------------------------------------------------------------------------------------------


def threat(name: str) -> Any:
    shape = shape_of(name)
    return shape.threat or ThreatModel("linf", shape.eps, shape.pixels)


def told(name: str, kind: Any, *, training: bool = False, **settings: Any) -> dict[str, Any]:
    """The settings, and as much of what a shape asks for as this callback can be told."""
    shape = shape_of(name)
    asked: Mapping[str, Any] = {**shape.arguments, **(shape.in_training if training else {})}
    taken = inspect.signature(kind).parameters
    given = {**settings, **{key: value for key, value in asked.items() if key in taken}}
    if isinstance(given.get("input_key"), list) and kind in (OODMonitor, CorruptionMonitor, SaliencySnapshots):
        given["input_key"] = given["input_key"][0]  # who shows one input is told which
    return given


def adversary(name: str, method: str) -> AdversarialTraining:
    attack = threat(name) if method == "n-fgsm" else PGD(threat(name), steps=2)
    return AdversarialTraining(attack, method, **told(name, AdversarialTraining, training=True))


def penalty(name: str) -> SaliencyRegularization:
    return SaliencyRegularization(InputGradientPenalty(), **told(name, SaliencyRegularization, training=True))


def monitors(name: str, *groups: str, strict: bool = False) -> list[Any]:
    """All monitors, or those of some groups, as a user of this shape would set them; strict ones raise."""
    code, shape = code_of(name), shape_of(name)
    sets = {"foreign": code.foreign()} if hasattr(code, "foreign") else None
    made = {
        "robustness": lambda: [RobustAccuracy(PGD(threat(name), steps=2), **told(name, RobustAccuracy, strict=strict))],
        "calibration": lambda: [
            CalibrationMonitor(**told(name, CalibrationMonitor, strict=strict)),
            TemperatureScaling(**told(name, TemperatureScaling, strict=strict)),
        ],
        "ood": lambda: [OODMonitor(sets, **told(name, OODMonitor, pixels=shape.pixels, strict=strict))],
        "shift": lambda: [
            CorruptionMonitor(
                severities=[5], per_epoch=3, **told(name, CorruptionMonitor, pixels=shape.pixels, strict=strict)
            )
        ],
        "saliency": lambda: [
            SaliencySnapshots(
                ["gradient"], samples=4, **told(name, SaliencySnapshots, pixels=shape.pixels, strict=strict)
            )
        ],
    }
    return [callback for group in groups or made for callback in made[group]()]


def measurable(name: str) -> list[str]:
    """The groups of monitors that end no fit of this shape."""
    return [group for group in GROUPS if group not in ("attacks", "penalties", *shape_of(name).errors)]


# -- the documented table --------------------------------------------------------------------------------------------


def outcome(shape: Shape, group: str) -> str:
    """What is declared for a group of callbacks: it serves, says that it measures nothing, or ends with an error."""
    if group in shape.errors:
        return "error"
    if group in shape.gaps:
        return "not yet"
    if group in shape.says:
        return "says so"
    return "yes"


def needs(shape: Shape) -> str:
    """What a user has to say, besides the pixel space."""
    asked = {**shape.arguments, **shape.in_training}
    return ", ".join(f"`{key}=`" for key in asked) or "nothing"


def markdown() -> str:
    """One row a shape: what it is, what callbacks must be told, and what every group of callbacks makes of it."""
    lines = [f"| shape | what it needs | {' | '.join(GROUPS)} |", "|---" * (2 + len(GROUPS)) + "|"]
    for name in SHAPES:
        shape = shape_of(name)
        cells = [outcome(shape, group) for group in GROUPS]
        lines.append(f"| {_escaped(shape.about)} | {needs(shape)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def summary() -> str:
    """How many shapes each group of callbacks serves, and how many need an argument."""
    outcomes = ("yes", "says so", "error", "not yet")
    lines = [f"| {len(SHAPES)} shapes | {' | '.join(GROUPS)} |", "|---" * (1 + len(GROUPS)) + "|"]
    for wanted in outcomes:
        found = [sum(outcome(shape_of(name), group) == wanted for name in SHAPES) for group in GROUPS]
        lines.append(f"| {wanted} | {' | '.join(map(str, found))} |")
    told = sum(needs(shape_of(name)) != "nothing" for name in SHAPES)
    return "\n".join([*lines, "", f"{told} of the {len(SHAPES)} need an argument besides their pixel space.", ""])


def _escaped(text: str) -> str:
    return re.sub(r"\|", r"\\|", text)
