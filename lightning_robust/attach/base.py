"""One callback base for both Lightning namespaces: attach in ``fit``, let go in every way that a fit can end."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

from lightning_robust._version import __version__
from lightning_robust.attach.checkpoint import read_entry, record_into_every_checkpoint, write_entry
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.route import Route

if TYPE_CHECKING:
    from pytorch_lightning import Callback as _Callback
else:
    from pytorch_lightning import Callback as _PytorchLightningCallback

    _bases = (_PytorchLightningCallback,)
    if importlib.util.find_spec("lightning") is not None:
        from lightning.pytorch import Callback as _LightningCallback

        _bases += (_LightningCallback,)
    _Callback = type("_Callback", _bases, {})

__all__ = [
    "RobustCallback",
    "log",
    "logged_step",
    "sections",
    "show_image",
    "show_or_save",
    "show_text",
    "shows_images",
]

log = logging.getLogger("lightning_robust")


class _BesideProgressBars(logging.Handler):
    """Writes lines without tearing up a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


if not logging.root.handlers and not log.handlers:
    # As Lightning does: an application that configures no logging still sees what was found.
    _handler = _BesideProgressBars()
    _handler.setFormatter(logging.Formatter("lightning_robust: %(message)s"))
    log.addHandler(_handler)
    log.setLevel(logging.INFO)


class RobustCallback(_Callback):
    """What all callbacks of this package share: keys, the checkpoint entry, and clean ends.

    A subclass attaches in :meth:`attach` and registers what undoes it with :meth:`on_detach`. Detaching happens in
    ``on_fit_end``, ``teardown`` and ``on_exception``, since Lightning skips ``teardown`` after an exception.

    Args:
        area: First part of the log keys.
        name: Tells two callbacks of one class apart; follows the area (``robust.strong/val/accuracy``).
        probe: How this callback reads steps.
    """

    def __init__(self, area: str, name: str | None, probe: Probe) -> None:
        super().__init__()
        self.area = area if name is None else f"{area}.{name}"
        self.name = name
        self.probe = probe
        self._undo: list[Callable[[], None]] = []
        self._recalled = False
        self.by_hand = False  # set by a mixin whose step asks for the perturbed batch itself

    @property
    def state_key(self) -> str:
        """Unique among callbacks of one class with different names."""
        return f"{type(self).__qualname__}{{'name': {self.name!r}}}"

    @property
    def label(self) -> str:
        """What it is called in messages and settings."""
        return type(self).__name__

    def key(self, stage: str, metric: str) -> str:
        """A log key, ``area/stage/metric``."""
        return f"{self.area}/{stage}/{metric}"

    def attach(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the module at the start of a fit; for subclasses."""

    def section(self) -> Mapping[str, Any]:
        """What this callback writes into checkpoints, by section; for subclasses."""
        return {}

    def on_detach(self, undo: Callable[[], None]) -> None:
        """Register what is to be undone at the end, whatever the end."""
        self._undo.append(undo)

    def say(self, trainer: Any, message: str) -> None:
        """One line to the user, from one process."""
        if trainer.is_global_zero:
            log.info(message)

    def settings(self) -> Mapping[str, Any]:
        """What decides the numbers of this callback, for the loggers; for subclasses."""
        return {}

    def clashes(self, other: RobustCallback) -> bool:
        """Whether two callbacks of one class and area would write the same keys; for subclasses."""
        return True

    # -- Lightning's hooks ---------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        for other in trainer.callbacks:
            if other is not self and type(other) is type(self) and other.area == self.area and self.clashes(other):
                raise ValueError(
                    f"two {type(self).__name__} callbacks would both write {self.area}/...; give one of them a name, "
                    f"e.g. name='strong', which makes its keys {self.area}.strong/..."
                )
        self._recalled = False
        # Who reads alike shares what is found, so that it is found once a run, not once a callback.
        ours = (c.probe for c in trainer.callbacks if isinstance(c, RobustCallback))
        self.probe = next((probe for probe in ours if probe.overrides == self.probe.overrides), self.probe)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._detach()  # a second fit, or one after a crash in somebody else's hook
        first = next(c for c in trainer.callbacks if isinstance(c, RobustCallback))
        if first is self:
            # One patch for all of us, in the hands of the first.
            self.on_detach(record_into_every_checkpoint(pl_module, lambda: sections(trainer), __version__))
        rows = "\n".join(f"| {name} | `{value}` |" for name, value in self.settings().items())
        show_text(trainer, self.key("settings", self.label), f"| setting | value |\n|---|---|\n{rows}")
        self.attach(trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._detach()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._detach()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # For full checkpoints after fit, when the module is no longer patched.
        write_entry(checkpoint, sections(trainer), __version__)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        try:
            self._restore(read_entry(checkpoint))
        except KeyError:
            return  # saved by a run without us: nothing is known beforehand

    def recall(self, trainer: Any) -> None:
        """Take over what the checkpoint of this run says; Lightning does not hand weights-only ones to callbacks."""
        if self._recalled or not trainer.ckpt_path:
            return
        self._recalled = True
        try:
            entry = read_entry(trainer.ckpt_path)
        except KeyError:
            return  # saved by a run without us
        except Exception as error:  # a checkpoint of any make: what Lightning can load must not fail here
            why = f"nothing read from {trainer.ckpt_path} ({type(error).__name__}); finding it anew"
            self.say(trainer, f"{type(self).__name__}: {why}.")
            return
        self._restore(entry)

    def restore(self, entry: Mapping[str, Any]) -> None:
        """Take over what this callback wrote into a checkpoint; for subclasses."""

    def _restore(self, entry: Mapping[str, Any]) -> None:
        self._recalled = True
        for step, route in entry.get("route", {}).items():
            self.probe.routes.setdefault(step, Route.from_dict(route))
        self.restore(entry)

    def _detach(self) -> None:
        with ExitStack() as stack:  # runs all, also if one raises
            for undo in self._undo:
                stack.callback(undo)
            self._undo = []


def show_text(trainer: Any, tag: str, text: str, *, file: bool = False) -> None:
    """Markdown into every logger that takes text; by what it can do, since the two Lightnings have two loggers.

    Args:
        trainer: Its loggers.
        tag: What it is called.
        text: Markdown.
        file: Where no logger takes text, write it into the run's folder instead.
    """
    if trainer.is_global_zero:
        takers = _taking(trainer, "add_text")
        for logger in takers:
            logger.experiment.add_text(tag, text)
        if file and not takers:
            _file(trainer, tag, ".md").write_text(text + "\n")


def show_image(trainer: Any, tag: str, picture: Tensor) -> None:
    """A picture ``(3, H, W)`` in [0, 1] into every logger that takes pictures."""
    if trainer.is_global_zero:
        for logger in _taking(trainer, "add_image"):
            logger.experiment.add_image(tag, picture, logged_step(trainer))


def shows_images(trainer: Any) -> bool:
    """Whether this process has a logger that takes pictures; if not, there is no use in drawing any."""
    return bool(trainer.is_global_zero and _taking(trainer, "add_image"))


def show_or_save(trainer: Any, tag: str, picture: Tensor) -> None:
    """A picture into every logger that takes pictures; where there is none, as a PNG file in the run's folder.

    The file is named after the tag, and the next picture of that tag takes its place.
    """
    if not trainer.is_global_zero:
        return
    if _taking(trainer, "add_image"):
        show_image(trainer, tag, picture)
        return
    from PIL import Image  # comes with TensorBoard; needed for pictures alone

    Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).save(_file(trainer, tag, ".png"))


def logged_step(trainer: Any) -> int:
    """The step that Lightning gives to what is logged: batches that stepped, however many optimizers there are."""
    # There is no public name for it. Elsewhere than in these Lightnings the number of optimizer steps will do.
    return int(getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step))


def _taking(trainer: Any, what: str) -> list[Any]:
    return [logger for logger in trainer.loggers if hasattr(getattr(logger, "experiment", None), what)]


def _file(trainer: Any, tag: str, suffix: str) -> Path:
    """A file of the run that is named after a tag."""
    folders = (getattr(logger, "log_dir", None) for logger in trainer.loggers)
    path = Path(next(filter(None, folders), trainer.default_root_dir), *tag.split("/"))
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(path.name + suffix)


def sections(trainer: Any) -> dict[str, Any]:
    """What all callbacks of a Trainer leave in its checkpoints, by section."""
    merged: dict[str, Any] = {}
    for callback in trainer.callbacks:
        if isinstance(callback, RobustCallback):
            routes = {step: route.to_dict() for step, route in callback.probe.routes.items()}
            for name, content in {"route": routes, **callback.section()}.items():
                merged[name] = {**merged.get(name, {}), **content}
    return merged
