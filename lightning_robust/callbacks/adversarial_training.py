"""Adversarial training of an unchanged module."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_robust.attach.base import RobustCallback
from lightning_robust.attach.batches import InputKey, Key, rebuilt
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.reading import Reading
from lightning_robust.attach.route import Route
from lightning_robust.attach.seam import install
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.attacks import NFGSM, PGD, JointThreat, ThreatModel
from lightning_robust.attacks.methods import attack_for, in_model_units, method_named, name_of
from lightning_robust.losses import LossCall
from lightning_robust.penalties import kl_divergence
from lightning_robust.randomness import RandomState, seeded

__all__ = ["AdversarialTraining"]


# Forward and input-gradient backward, as a share of a whole training step (docs/adversarial-training.md).
STEP_COST = 0.77


class AdversarialTraining(RobustCallback):
    """Train on the worst case inside a threat model instead of on the clean input.

    The user's ``training_step`` stays as it is: it is fed the attacked batch (``madry``, ``n-fgsm``), or runs on the
    clean batch and a weighted divergence is added to its loss (``trades``). The attack climbs the loss that the step
    itself calls, class weights, label smoothing and in-step mixup included.

    =========  ==================================================  ======================  ==================
    method     what is minimised                                   attack given            BatchNorm forwards
    =========  ==================================================  ======================  ==================
    madry      loss at the attacked input                          PGD, any, ThreatModel   1 (attacked)
    trades     loss + beta * KL(clean prediction || attacked one)  PGD, ThreatModel        2 (clean, attacked)
    n-fgsm     loss at a one-step attack from strong noise         ThreatModel, NFGSM      1 (attacked)
    =========  ==================================================  ======================  ==================

    Metrics that the step itself logs are computed on what it was fed.

    Args:
        attack: An attack, any callable ``(logits_fn, x, y) -> x_adv``, or a threat model (then the method's usual
            attack: PGD with 10 steps, or N-FGSM).
        method: ``"madry"``, ``"trades"`` or ``"n-fgsm"``.
        beta: Weight of the divergence in ``trades`` (default 6).
        warmup_epochs: The radius grows linearly from 0 to eps over so many epochs, in each step a little. Training at
            a large radius from the first step can fail to start.
        craft_mode: ``"eval"`` crafts with BatchNorm and dropout as in evaluation (usual, 19 % cheaper); ``"train"``
            leaves every module's flag as it is. Running statistics never move while crafting.
        seed: Of the attack's own random numbers; they are a function of (seed, rank, step).
        input_key: Where in the batch the input is, if it cannot be told; a list for several inputs.
        target_key: Where the target is, if the loss cannot be read.
        logits_fn: ``(module, batch) -> logits`` for hand-written losses; needs ``target_key``.
        loss_index: Which loss call of the step is attacked, 0 for the first.
        name: Tells two callbacks of this class apart in log keys.

    Logs ``robust/train/kl`` (weighted), ``robust/train/kl_weight`` and ``robust/train/clean_loss`` with ``trades``, and
    ``robust/train/outside_box`` if inputs leave the pixel bounds.

    Raises:
        ValueError: If the method is unknown or an explicit setting contradicts it.

    Example:
        >>> threat = ThreatModel("linf", eps=8 / 255)
        >>> callback = AdversarialTraining(PGD(threat, steps=10), method="trades", beta=6.0)
        >>> AdversarialTraining(threat, method="n-fgsm").attack
        NFGSM(threat=ThreatModel(norm='linf', eps=0.03137254901960784, ...), noise=2.0, step=1.0, objective=None)

    References:
        Madry et al., 2018, https://arxiv.org/abs/1706.06083. Zhang et al. (TRADES), 2019,
        https://arxiv.org/abs/1901.08573, equation 5. de Jorge et al. (N-FGSM), 2022, https://arxiv.org/abs/2202.01181.
    """

    def __init__(
        self,
        attack: PGD | NFGSM | ThreatModel | JointThreat | Callable[..., Any],
        method: str = "madry",
        *,
        beta: float | None = None,
        warmup_epochs: float = 0.0,
        craft_mode: str = "eval",
        seed: int = 0,
        input_key: InputKey | None = None,
        target_key: Key | None = None,
        logits_fn: Callable[..., Any] | None = None,
        loss_index: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__("robust", name, Probe(input_key, target_key, logits_fn, loss_index))
        self.method = method_named(method)
        self.attack = attack_for(self.method, attack)
        if beta is not None and self.method != "trades":
            raise ValueError(
                f"beta= weighs the divergence of method='trades'; method={method!r} has none. Leave it out."
            )
        if craft_mode not in ("eval", "train"):
            raise ValueError(f"craft_mode= must be 'eval' or 'train', got {craft_mode!r}.")
        if warmup_epochs < 0 or (beta is not None and beta < 0):
            raise ValueError(f"warmup_epochs= and beta= must not be negative, got {warmup_epochs} and {beta}.")
        self.threat: ThreatModel | JointThreat | None = getattr(self.attack, "threat", None)
        if warmup_epochs and self.threat is None:
            raise ValueError(
                f"warmup_epochs= scales the threat model of an attack, but {name_of(self.attack)} has no `threat`."
            )
        self.beta = 6.0 if beta is None else float(beta)
        self.warmup_epochs, self.craft_mode, self.seed = warmup_epochs, craft_mode, seed
        self._trainer: Any = None
        self._batch_idx = 0
        self._crafted: Tensor | None = None
        self._checked = self._warned = False

    def settings(self) -> Mapping[str, Any]:
        own = {"warmup_epochs": self.warmup_epochs, "craft_mode": self.craft_mode, "seed": self.seed}
        weight = {"beta": self.beta} if self.method == "trades" else {}
        return {"attack": self.attack, "method": self.method, **weight, **own}

    # -- when ----------------------------------------------------------------------------------------------------

    def attach(self, trainer: Any, pl_module: Any) -> None:
        self._trainer, self._checked, self._warned = trainer, False, False
        if any(type(c).__name__ in ("LearningRateFinder", "BatchSizeFinder") for c in trainer.callbacks):
            self.say(trainer, f"{self}: tuners run without callbacks, so what they find is fitted to clean training.")
        loss_index = self.probe.loss_index
        if self.method == "trades":
            handle = install(
                pl_module,
                str(self),
                before=self._craft_once,
                add=self._divergence,
                watched=self.probe.logits_fn is None,
                loss_index=loss_index,
                adversary=True,
                by_hand=self.by_hand,
            )
        else:
            handle = install(pl_module, str(self), feed=self._fed, by_hand=self.by_hand)
        self.on_detach(handle.detach)
        self.on_detach(self._forget)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._batch_idx, self._crafted = batch_idx, None

    def _forget(self) -> None:
        self._trainer = self._crafted = None

    def __str__(self) -> str:
        return f"AdversarialTraining({self.method})"

    # -- what ----------------------------------------------------------------------------------------------------

    def _fed(self, step: Step) -> Any:
        self._craft_once(step)
        # A copy: the step may write into its batch, and LBFGS calls it again with the same perturbation.
        return rebuilt(step.batch, self._route(step).inputs.into(step.batch, self._perturbed().clone()))

    def _craft_once(self, step: Step) -> None:
        if self._crafted is not None:
            return
        with self.probe.reading(step, training=False if self.craft_mode == "eval" else None) as reading:
            if not self._checked:
                self._first_batch(step, reading)
            attack = self._attack_now(reading)
            keys = (self.seed, self._trainer.global_rank, self._trainer.global_step, self._batch_idx)
            self._crafted = reading.guarded(attack)(reading.logits, reading.x, reading.y, generator=seeded(*keys))
        if self.threat is not None:
            self._count_outside(step, reading.threat(self.threat).pixels, reading.x)

    def _attack_now(self, reading: Reading) -> Any:
        attack = self.attack
        if self.threat is not None and isinstance(attack, (PGD, NFGSM)):
            fraction = self._eps_fraction()
            # The first batch was inside the bounds; later ones may overshoot (augmentation) and are counted.
            threat = reading.threat(self.threat).scaled(fraction).widened()
            attack = replace(attack, threat=threat)
            if isinstance(attack, PGD) and attack.step_size is not None:
                attack = replace(attack, step_size=max(attack.step_size * fraction, 1e-12))
            if self.method == "trades":
                attack = replace(attack, start="gaussian", objective=self._away_from_clean(reading))
            elif attack.objective is None:
                attack = replace(attack, objective=reading)
        elif self.warmup_epochs and self.threat is not None:
            attack = replace(attack, threat=self.threat.scaled(self._eps_fraction()))
        return attack

    def _eps_fraction(self) -> float:
        if not self.warmup_epochs:
            return 1.0
        epoch: float = self._trainer.current_epoch
        batches = self._trainer.num_training_batches
        if batches != float("inf"):
            epoch += (self._batch_idx + 1) / batches
        return min(1.0, epoch / self.warmup_epochs)

    @staticmethod
    def _away_from_clean(reading: Reading) -> Callable[[Tensor, Tensor], Tensor]:
        # Once a batch: the clean prediction does not change while the attack climbs away from it.
        with torch.no_grad():
            clean = reading.read(reading.x).log_probabilities()

        def objective(logits: Tensor, y: Tensor) -> Tensor:
            call = reading.call
            if call is None:
                raise ProbeError("the objective was asked for before any logits were read.")
            return kl_divergence(clean, call.again(logits).log_probabilities())

        return objective

    def _divergence(self, step: Step, clean: LossCall | None, state: RandomState) -> Mapping[str, Tensor]:
        # As they are in this step: train mode, dropout masks and mixup replayed, BatchNorm sees the attacked batch too.
        with self.probe.reading(step, training=None, keep_buffers=True, state=state) as reading:
            if self.probe.logits_fn is not None:
                clean = reading.read(reading.x)
            attacked = reading.read(self._perturbed())
        if clean is None:
            raise ProbeError(
                f"{self}: this step called no loss, though the first one did; give logits_fn= and target_key=."
            )
        log_p, log_q = clean.log_probabilities(), attacked.log_probabilities()
        positions = log_p[0, 0].numel()  # 1, or pixels and labels, over which the usual loss averages too
        term = self.beta * kl_divergence(log_p, log_q).mean() / positions
        terms = {
            "kl": term.detach(),
            "kl_weight": self.beta,
            "clean_loss": clean.per_sample().detach().mean() / positions,
        }
        for metric, value in terms.items():
            self._log(step.module, metric, value, len(reading.x))
        return {"kl": term}

    # -- what the user hears -------------------------------------------------------------------------------------

    def _first_batch(self, step: Step, reading: Reading) -> None:
        self._checked = True
        if self.threat is not None:
            reading.threat(self.threat).pixels.check(reading.x)
        with torch.no_grad():
            logits = reading.read(reading.x).logits
        if not bool(logits.isfinite().all()):
            raise ValueError(
                f"{self}: expected finite logits, got {int((~logits.isfinite()).sum())} NaN or infinite values for the "
                "first batch. The weights are not finite, or a layer divides by zero or overflows on clean inputs."
            )
        lines = [
            f"{self}: {name_of(self.attack)}, {reading.found}",
            self._cost(step.module),
            "metrics logged by training_step are computed on "
            + ("the clean batch" if self.method == "trades" else "the attacked batch"),
        ]
        if self.threat is not None:
            lines.insert(1, in_model_units(self.threat))
        self.say(self._trainer, "; ".join(line for line in lines if line) + ".")

    def _cost(self, module: nn.Module) -> str:
        norms = sum(isinstance(part, _BatchNorm) for part in module.modules())
        seen = 1
        if self.method == "trades":  # the step's own clean forward gave no logits where logits_fn= has to
            seen = 2 if self.probe.logits_fn is None else 3
        batch_norm = f", BatchNorm sees {seen} forward{'s' if seen > 1 else ''} a step" if norms else ""
        if not isinstance(self.attack, (PGD, NFGSM)):
            return batch_norm.removeprefix(", ")
        steps = self.attack.steps * self.attack.restarts if isinstance(self.attack, PGD) else 1
        multiple = 1 + STEP_COST * steps + (1.2 if self.method == "trades" else 0)
        return f"about {multiple:.1f} times the cost of a clean step{batch_norm}"

    def _count_outside(self, step: Step, space: Any, x: Tensor) -> None:
        outside = space.count_outside(x)
        if not outside:
            return
        self._log(step.module, "outside_box", float(outside), len(x), reduce_fx="sum")
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{outside} of {len(x)} inputs leave the pixel bounds {space.bounds} (augmentation?). They keep their "
                f"own wider bounds and are counted in {self.key('train', 'outside_box')}.",
                stacklevel=2,
            )

    def _log(self, module: Any, metric: str, value: Any, batch_size: int, reduce_fx: str = "mean") -> None:
        module.log(
            self.key("train", metric), value, on_step=False, on_epoch=True, batch_size=batch_size, reduce_fx=reduce_fx
        )

    def _route(self, step: Step) -> Route:
        return self.probe.routes[step.name]

    def _perturbed(self) -> Tensor:
        if self._crafted is None:
            raise RuntimeError(f"{self} was asked for perturbed inputs before the batch was crafted.")
        return self._crafted
