"""AutoAttack by its authors' own package: the number that papers report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_robust.attacks.adapters import StandIn, lent
from lightning_robust.attacks.threat import ThreatModel
from lightning_robust.protocols import LogitsFn
from lightning_robust.randomness import untouched_random_state

__all__ = ["AutoAttack"]

Part = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]
_CLASSES_OF_STANDARD = 10  # it aims at nine wrong ones


@dataclass(frozen=True)
class AutoAttack:
    """AutoAttack (APGD-CE, APGD-T, FAB-T, Square, one after the other on what holds), run by ``pyautoattack``.

    It is named ``autoattack-standard`` only where it is the unmodified protocol: ten classes or more and
    ``version="standard"``. With fewer classes there are fewer wrong ones to aim at, and below four the targeted DLR
    loss does not exist (APGD-T is left out): say ``classes=`` then, and report it as modified.

    It runs in fp32, decides sample by sample how many forwards it needs, and treats a sample by its pixels alone: it is
    for networks whose logits for one sample depend neither on the others nor on anything else in the batch, which is
    tried out. Of the package's own checks the one for dynamic defences is left out; others speak through the logger
    ``auto-attack``.

    Args:
        threat: The ball and the pixel space, which needs bounds; pictures ``(N, C, H, W)``.
        version: ``"standard"`` or ``"plus"``.
        seed: Of its random starts, the same in every batch.
        only: Some attacks of it, by name and in order, with the settings that they have in ``version``; modified too.
        classes: How many, if there are fewer than ten.
        batch_size: Samples a forward.
        objective: Only what it says about the model's head counts. Callbacks fill it in.

    Raises:
        ModuleNotFoundError: When called, if ``pyautoattack`` is missing: ``pip install 'lightning-robust[eval]'``.
        ValueError: If there are no bounds, an attack is unknown or needs more classes, or there are other than
            ``classes``, or fewer than ten and ``classes=`` does not say so.

    Example:
        >>> from lightning_robust import ThreatModel
        >>> AutoAttack(ThreatModel("linf", eps=8 / 255)).name
        'autoattack-standard_linf_0.03137'
        >>> AutoAttack(ThreatModel("linf", eps=8 / 255), classes=3).name
        'autoattack-modified_linf_0.03137'

    References:
        Croce and Hein, `Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks <https://arxiv.org/abs/2003.01690>`_, 2020.
    """

    threat: ThreatModel
    version: Literal["standard", "plus"] = "standard"
    seed: int = 0
    only: Sequence[Part] | None = None  # not "attacks": what has such a field is the worst case of attacks of ours
    classes: int | None = None
    batch_size: int = 250
    objective: str | Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if self.version not in ("standard", "plus"):
            raise ValueError(f"AutoAttack(version=) must be 'standard' or 'plus', got {self.version!r}.")
        if self.threat.pixels.bounds is None:
            raise ValueError("AutoAttack needs pixel bounds, got a threat model with PixelSpace(bounds=None).")
        if self.classes is not None and self.classes < 2:
            raise ValueError(f"AutoAttack(classes=) is the number of classes, from 2 on, got {self.classes}.")
        if self.only is not None:
            parts = (self.only,) if isinstance(self.only, str) else tuple(self.only)
            object.__setattr__(self, "only", parts)
            if not parts or not set(parts) <= set(get_args(Part)):
                raise ValueError(
                    f"AutoAttack(only=) takes some of {', '.join(get_args(Part))}, got {', '.join(parts) or 'none'}."
                )

    @property
    def name(self) -> str:
        """``autoattack-standard_linf_0.2``; ``autoattack-modified_...`` where it is not the protocol of papers."""
        if self.only is not None:
            what = "-".join(["modified", *self.only])
        else:
            few = self.classes is not None and self.classes < _CLASSES_OF_STANDARD
            what = "modified" if few else self.version
        return f"autoattack-{what}_{self.threat}"

    # Without `generator`: the package seeds the global streams by a number.
    def __call__(self, logits_fn: LogitsFn, x: Tensor, y: Tensor) -> Tensor:
        """Perturb ``x`` (model inputs, ``(N, C, H, W)``) against targets ``y``; the result has the type of ``x``.

        Labels are classes ``(N,)``, probabilities ``(N, K)``, or 0/1 for a single output.
        """
        try:
            import pyautoattack
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("AutoAttack needs pyautoattack: pip install 'lightning-robust[eval]'") from error
        if x.ndim != 4:
            raise ValueError(f"AutoAttack is for pictures (N, C, H, W), got {tuple(x.shape)}. Use APGD and Square.")
        single = torch.autocast(x.device.type, enabled=False)
        with single, untouched_random_state(), lent(self.threat, logits_fn, x, y, self.objective) as lent_batch:
            model, pixels, returned = lent_batch
            # A sample outside would be moved into the bounds first, and seem to hold for that reason.
            replace(self.threat.pixels, outside="raise").check(x)
            model.check_rows()
            low, high = self.threat.pixels.bounds or (0.0, 1.0)
            attack = pyautoattack.AutoAttack(
                lambda unit: model(low + unit * (high - low)),
                norm={"linf": "Linf", "l2": "L2"}[self.threat.norm],
                eps=self.threat.eps / (high - low),
                version=self.version,
                seed=self.seed,
                device=str(x.device),
            )
            attack.verbose = False
            self._fit(attack, model)
            clean = (pixels - low) / (high - low)
            with _no_tracing(pyautoattack):
                found, _ = attack.run_standard_evaluation(clean, model.labels, batch_size=self.batch_size)
            # To [0, 1] and back rounds: nothing may leave ball and box by that.
            return returned(self.threat.project(low + found * (high - low), pixels, (low, high)))

    def _fit(self, attack: Any, model: StandIn) -> None:
        """What is run, on so many classes."""
        found = model.classes
        if self.classes is not None and self.classes != found:
            raise ValueError(f"AutoAttack was told of classes={self.classes}, but the model has {found}.")
        if self.classes is None and found < _CLASSES_OF_STANDARD:
            raise ValueError(
                f"AutoAttack's standard protocol aims at 9 wrong classes, but there are {found} classes. Say "
                f"classes={found}: it then aims at all wrong ones and is named 'autoattack-modified'."
            )
        wrong = min(found, _CLASSES_OF_STANDARD) - 1
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = wrong
        # The targeted DLR loss needs four logits, the plain one three.
        missing = {"apgd-t"} if found == 3 else {"apgd-t", "apgd-dlr"} if found == 2 else set()
        if missing & set(self.only or ()):
            raise ValueError(f"there is no {' and no '.join(sorted(missing))} for {found} classes, got {self.only}.")
        planned = attack.attacks_to_run if self.only is None else self.only
        attack.attacks_to_run = [part for part in planned if part not in missing]


@contextmanager
def _no_tracing(package: Any) -> Iterator[None]:
    """Without the check that sets a trace function, which would end debuggers and coverage."""
    checks = package.autoattack.checks
    original, checks.check_dynamic = checks.check_dynamic, lambda *args, **kwargs: None
    try:
        yield
    finally:
        checks.check_dynamic = original
