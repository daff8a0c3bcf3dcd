"""The same pieces for people who write their own modules: mixins that attach them, or call them from a step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_robust.attach.checkpoint import read_entry
from lightning_robust.attach.scaling import route_of, scale_output, stored_temperature
from lightning_robust.attach.seam import perturbed, robust_loss
from lightning_robust.attach.specs import built, plain
from lightning_robust.attacks import NFGSM, PGD, JointThreat, ThreatModel
from lightning_robust.callbacks import AdversarialTraining, SaliencyRegularization, TemperatureScaling
from lightning_robust.penalties import PENALTIES

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule as _Module
else:
    _Module = object  # a Lightning base of either namespace comes from the user's own class

__all__ = ["CalibratedMixin", "RobustTrainingMixin"]


class RobustTrainingMixin(_Module):
    """A LightningModule that names its defences once, and trains with them in every Trainer.

    List it before the Lightning base. Callbacks of :meth:`configure_robustness` are attached by Lightning through
    ``configure_callbacks``; the weights are bitwise those of a run with the same callbacks given to the Trainer.

    With ``by_hand = True`` the module's own ``training_step`` calls :meth:`perturbed` and :meth:`robust_loss`, and the
    defences touch nothing else. A step that calls neither is an error.

    Attributes:
        by_hand: Whether ``training_step`` calls the defences itself.

    Example:
        >>> import pytorch_lightning as pl
        >>> from torch.nn.functional import cross_entropy
        >>> from lightning_robust import InputGradientPenalty
        >>> class MyModule(RobustTrainingMixin, pl.LightningModule):
        ...     by_hand = True
        ...
        ...     def configure_robustness(self):
        ...         return [ThreatModel("linf", eps=8 / 255), InputGradientPenalty()]
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         x, y = self.perturbed(batch)
        ...         return self.robust_loss(cross_entropy(self.net(x), y))
        >>> MyModule().configure_callbacks()
        [<...AdversarialTraining object at ...>, <...SaliencyRegularization object at ...>]
    """

    by_hand: bool = False
    _defences: _Built | None = None

    def configure_robustness(self) -> Sequence[Any]:
        """The defences and monitors: callbacks, attacks or threat models (trained against), penalties (added).

        A bare attack or threat model stands for ``AdversarialTraining(it)``, a bare penalty for
        ``SaliencyRegularization(it)``; any of them may be the plain dict that a checkpoint's hyper-parameters hold.
        For the user to write; ``super().configure_robustness()`` gives those of other bases. It is asked once for each
        module: ``Trainer.test`` finds what ``fit`` left in the callbacks (a temperature).
        """
        return []

    def save_hyperparameters(self, *args: Any, frame: Any = None, **settings: Any) -> None:
        """Lightning's own; attacks, threat models and penalties among the arguments are kept as plain dicts.

        A checkpoint with objects in it is not loaded by ``load_from_checkpoint``. The constructor is then given the
        dicts: :func:`~lightning_robust.attach.specs.built`, or :meth:`configure_robustness`, turns them back.
        """
        here = inspect.currentframe()
        super().save_hyperparameters(*args, frame=frame or (here and here.f_back), **settings)
        # What loggers are given is a copy that was made already.
        for kept in (self.hparams, vars(self).get("_hparams_initial") or {}):
            for name, value in kept.items():
                kept[name] = plain(value)

    def configure_callbacks(self) -> list[Any]:
        """Lightning's hook: the defences, behind the callbacks of other bases."""
        if self._defences is None:
            self._defences = _Built()
        if self._defences.callbacks is None:
            self._defences.callbacks = [_callback(defence) for defence in self.configure_robustness()]
        defences = self._defences.callbacks
        for defence in defences:
            if isinstance(defence, (AdversarialTraining, SaliencyRegularization)):
                defence.by_hand = self.by_hand
        others = super().configure_callbacks()
        return [*(others if isinstance(others, Sequence) else [others]), *defences]

    def perturbed(self, batch: Any) -> Any:
        """The batch with its input attacked; only the input differs.

        To be called once, at the start of ``training_step``, with the batch as the step got it. In evaluation, without
        a Trainer, and without an attack that feeds the step (TRADES attacks beside it) it returns the batch as it is.
        """
        return perturbed(self, batch)

    def robust_loss(self, loss: Tensor) -> Tensor:
        """``loss`` plus the weighted terms of the defences (penalties, TRADES' divergence).

        To be called once, at the end of ``training_step``, with the loss that is to be returned or differentiated.
        """
        return robust_loss(self, loss)


class _Built:
    """The callbacks of one module, built once: Lightning asks for them in each run. A copy of it builds its own."""

    callbacks: list[Any] | None = None

    def __reduce__(self) -> tuple[type[_Built], tuple[()]]:  # what deep copies and pickles are made from
        return _Built, ()


def _callback(defence: Any) -> Any:
    if isinstance(defence, Mapping):
        defence = built(defence)
    if isinstance(defence, (PGD, NFGSM, ThreatModel, JointThreat)):
        return AdversarialTraining(defence, "n-fgsm" if isinstance(defence, NFGSM) else "madry")
    if isinstance(defence, PENALTIES):
        return SaliencyRegularization(defence)
    return defence


class CalibratedMixin(_Module):
    """A LightningModule whose ``load_from_checkpoint`` brings its temperature along.

    List it before the Lightning base. In eval mode, outside of ``Trainer.fit``, the logits of a module that was loaded
    from a checkpoint are divided by the temperature that :class:`~lightning_robust.TemperatureScaling` stored there, as
    :func:`~lightning_robust.calibrated` does it. Checkpoints without a temperature load as ever, and a ``fit`` forgets
    the temperature: it belongs to the weights that were loaded.

    Attributes:
        temperature: What was loaded; None if there was none, or if the module was trained on since.
        temperature_name: ``name`` of the TemperatureScaling callback whose temperature is loaded, if it has one.

    Example:
        >>> import pytorch_lightning as pl
        >>> class MyModule(CalibratedMixin, pl.LightningModule): ...
        >>> MyModule().temperature is None
        True
    """

    temperature: float | None = None
    temperature_name: str | None = None
    _unscale: Callable[[], None] | None = None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook: take the temperature over."""
        super().on_load_checkpoint(checkpoint)
        self._forget_temperature()
        try:
            entry = read_entry(checkpoint)
            temperature = stored_temperature(entry, name=self.temperature_name)
        except KeyError:
            return
        route = route_of(entry)
        if route is None:
            return
        self.temperature = temperature
        self._unscale = scale_output(self, route, self._present_temperature)

    def on_fit_start(self) -> None:
        """Lightning's hook: forget the temperature, since what is trained on becomes another model."""
        super().on_fit_start()
        self._forget_temperature()

    def _forget_temperature(self) -> None:
        undo, self._unscale = self._unscale, None
        if undo is not None:
            undo()
        self.temperature = None

    def _present_temperature(self) -> float | None:
        return None if self.training or (self._trainer and _sees_raw_logits(self._trainer)) else self.temperature


def _sees_raw_logits(trainer: Any) -> bool:
    state = trainer.state
    if state.fn in ("test", "predict") and state.status == "running":  # a callback may divide already
        return any(isinstance(callback, TemperatureScaling) and callback.apply for callback in trainer.callbacks)
    # While it is fitted, validation has to see the logits that are trained.
    return bool(state.fn == "fit")
