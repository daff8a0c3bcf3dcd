"""Adversarial training of an unchanged module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_robust.attach.base import RobustCallback
from lightning_robust.attach.batches import InputKey, Key, rebuilt
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.reading import Reading
from lightning_robust.attach.schedule import warm
from lightning_robust.attach.seam import install, leave_weights
from lightning_robust.attach.sharded import is_sharded
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.attach.worst_weights import at_worst_weights, steepest_weights
from lightning_robust.attacks import FGSM, NFGSM, PGD, JointThreat, ThreatModel
from lightning_robust.attacks.joint import side_by_side
from lightning_robust.attacks.methods import (
    BETA,
    FEEDS,
    STEP_COST,
    attack_for,
    cost_of,
    in_model_units,
    method_named,
    name_of,
)
from lightning_robust.callbacks.adversary import Adversary, threat_of
from lightning_robust.callbacks.overfitting import OverfittingAlarm
from lightning_robust.callbacks.teacher import Teacher
from lightning_robust.losses import LossCall
from lightning_robust.penalties.robust_terms import distillation, mart, mean_loss, trades
from lightning_robust.randomness import RandomState

__all__ = ["AdversarialTraining"]


TERMS = {"trades": trades, "mart": mart}
"""What is added to the loss, from what the model says of the clean and of the attacked input."""


class AdversarialTraining(RobustCallback):
    """Train on the worst case inside a threat model instead of on the clean input.

    The user's ``training_step`` stays as it is: it is fed the attacked batch, and terms are added to its loss. The
    attack climbs the loss that the step itself calls, class weights, label smoothing and in-step mixup included.

    =========  ===========================================================  =====================  ==================
    method     what is minimised                                            attack given           BatchNorm forwards
    =========  ===========================================================  =====================  ==================
    madry      loss at the attacked input                                   PGD, any, ThreatModel  1 (attacked)
    trades     loss + beta * KL(clean prediction || attacked one)           PGD, ThreatModel       2 (clean, attacked)
    mart       loss at the attacked input - log(1 - likeliest wrong class)  PGD, any, ThreatModel  2 (attacked, clean)
               + beta * KL(clean || attacked) * (1 - p of the right class)
    n-fgsm     loss at a one-step attack from strong noise                  ThreatModel, NFGSM     1 (attacked)
    fgsm-rs    loss at a one-step attack from a random start                ThreatModel, FGSM      1 (attacked)
    fgsm       loss at a one-step attack; collapses at larger radii         ThreatModel, FGSM      1 (attacked)
    =========  ===========================================================  =====================  ==================

    Beside any of them: only a ``share`` of each batch attacked (the others stay clean), adversarial weight
    perturbation (``awp``), and distillation from a robust ``teacher``. Metrics that the step itself logs are computed
    on what it was fed.

    At the end of an epoch its last training batch is attacked with PGD-10 (of every epoch, unless epochs are so short
    that this would cost more than a twentieth of the training): ``robust/train/accuracy``, beside
    ``robust/val/accuracy``, shows robust overfitting. For one-step methods FGSM accuracy is measured as well: where PGD
    accuracy falls below 0.3 of it, the network has learnt to defend against one step alone (catastrophic overfitting),
    and ``overfitting`` decides what happens.

    Args:
        attack: An attack, any callable ``(logits_fn, x, y) -> x_adv``, or a threat model (then the method's usual
            attack: PGD with 10 steps, or the one-step attack).
        method: One of the above.
        beta: Weight of the divergence in ``trades`` (default 6) and ``mart`` (default 5).
        share: Of the samples of each batch that are attacked, for methods that feed the step; drawn anew each time.
        warmup_epochs: The radius grows linearly from 0 to eps over so many epochs, in each step a little. Training at
            a large radius from the first step can fail to start.
        beta_warmup_epochs: Likewise for ``beta``.
        start_epoch: The first epoch that is attacked; before it the training is clean.
        awp: Length of the weight perturbation relative to each layer's weights, e.g. 0.005; None for none. Weights of
            two and more dimensions are perturbed, with the same step on all processes. Costs one more training step.
        awp_start_epoch: The first epoch with weight perturbation.
        teacher: A network that maps the *clean* input to logits; ``KL(teacher || prediction at the attacked input)`` is
            added. It is not trained, and not part of the module.
        teacher_weight: Weight of that term.
        overfitting: On catastrophic overfitting: ``"warn"`` (once); ``"switch"`` to PGD with 10 steps as well;
            ``"ignore"``: measure nothing.
        craft_mode: ``"eval"`` crafts with BatchNorm and dropout as in evaluation (usual, 19 % cheaper); ``"train"``
            leaves every module's flag as it is. Running statistics never move while crafting.
        seed: Of the attack's own random numbers; they are a function of (seed, rank, step).
        input_key: Where in the batch the input is, if it cannot be told; a list for several inputs.
        target_key: Where the target is, if the loss cannot be read.
        mask_key: Where in the batch a mask is, 1 where the attack may change the input.
        eps_key: Where in the batch a radius for each sample is, in pixel units, instead of the threat model's.
        logits_fn: ``(module, batch) -> logits`` for hand-written losses; needs ``target_key``.
        loss_index: Which loss call of the step is attacked, 0 for the first.
        name: Tells two callbacks of this class apart in log keys.

    Logs ``robust/train/{kl,margin,distillation}`` (weighted), ``robust/train/kl_weight`` and
    ``robust/train/clean_loss`` where the method has them, ``robust/train/accuracy``, and ``robust/train/outside_box``
    if inputs leave the pixel bounds; with a one-step method ``robust/train/fgsm_accuracy`` and
    ``robust/train/pgd_to_fgsm``.

    Raises:
        ValueError: If the method is unknown or an explicit setting contradicts it.

    Example:
        >>> threat = ThreatModel("linf", eps=8 / 255)
        >>> callback = AdversarialTraining(PGD(threat, steps=10), method="trades", beta=6.0, awp=0.005)
        >>> AdversarialTraining(threat, method="n-fgsm").attack
        NFGSM(threat=ThreatModel(norm='linf', eps=0.03137254901960784, ...), noise=2.0, step=1.0, objective=None)

    References:
        Madry et al., 2018, https://arxiv.org/abs/1706.06083. Zhang et al. (TRADES), 2019,
        https://arxiv.org/abs/1901.08573, equation 5. Wang et al. (MART), 2020,
        https://openreview.net/forum?id=rklOg6EFwS. de Jorge et al. (N-FGSM), 2022, https://arxiv.org/abs/2202.01181.
        Wong et al. (FGSM-RS), 2020, https://arxiv.org/abs/2001.03994. Wu et al. (AWP), 2020,
        https://arxiv.org/abs/2004.05884. Kurakin et al. (mixed batches), 2017, https://arxiv.org/abs/1611.01236.
        Goldblum et al. (robust distillation), 2020, https://arxiv.org/abs/1905.09747.
    """

    def __init__(
        self,
        attack: PGD | NFGSM | FGSM | ThreatModel | JointThreat | Callable[..., Any],
        method: str = "madry",
        *,
        beta: float | None = None,
        share: float = 1.0,
        warmup_epochs: float = 0.0,
        beta_warmup_epochs: float = 0.0,
        start_epoch: int = 0,
        awp: float | None = None,
        awp_start_epoch: int = 0,
        teacher: Callable[..., Any] | None = None,
        teacher_weight: float = 1.0,
        overfitting: str = "warn",
        craft_mode: str = "eval",
        seed: int = 0,
        input_key: InputKey | None = None,
        target_key: Key | None = None,
        mask_key: Key | None = None,
        eps_key: Key | None = None,
        logits_fn: Callable[..., Any] | None = None,
        loss_index: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__("robust", name, Probe(input_key, target_key, logits_fn, loss_index, mask_key, eps_key))
        self.method = method_named(method)
        self.attack = attack_for(self.method, attack)
        if (beta is not None or beta_warmup_epochs) and self.method not in BETA:
            raise ValueError(
                f"beta= weighs the divergence of method='trades' and 'mart'; method={method!r} has none. Leave it out."
            )
        if craft_mode not in ("eval", "train"):
            raise ValueError(f"craft_mode= must be 'eval' or 'train', got {craft_mode!r}.")
        if overfitting not in ("warn", "switch", "ignore"):
            raise ValueError(f"overfitting= must be 'warn', 'switch' or 'ignore', got {overfitting!r}.")
        numbers = {"warmup_epochs": warmup_epochs, "beta": beta or 0.0, "beta_warmup_epochs": beta_warmup_epochs}
        numbers |= {"start_epoch": start_epoch, "awp": awp or 0.0, "awp_start_epoch": awp_start_epoch}
        numbers |= {"teacher_weight": teacher_weight}
        for setting, value in numbers.items():
            if not value >= 0:
                raise ValueError(f"{setting}= must not be negative, got {value}.")
        if not 0 < share <= 1 or (share < 1 and self.method != "madry" and "fgsm" not in self.method):
            raise ValueError(
                f"share= is the part of each batch that is attacked, above 0 and up to 1, for methods that feed the "
                f"step ({', '.join(m for m in FEEDS if m != 'mart')}); got {share} with method={method!r}."
            )
        self.threat = threat_of(self.attack)
        if warmup_epochs and self.threat is None:
            raise ValueError(
                f"warmup_epochs= scales the threat model of an attack, but {name_of(self.attack)} has no `threat`."
            )
        self.beta = BETA.get(self.method, 0.0) if beta is None else float(beta)
        self.beta_warmup_epochs, self.awp, self.awp_start_epoch = beta_warmup_epochs, awp, awp_start_epoch
        self.teacher = None if teacher is None else Teacher(teacher, teacher_weight)
        self.adversary = Adversary(self.method, share, warmup_epochs, start_epoch, craft_mode, seed)
        self.alarm = OverfittingAlarm(
            overfitting, self.threat, "fgsm" in self.method, self._step_cost() or STEP_COST, seed
        )
        self._clean: Step | None = None
        self._checked = False

    def settings(self) -> Mapping[str, Any]:
        adversary = self.adversary
        shown: dict[str, Any] = {"attack": self.attack, "method": self.method}
        shown |= {"beta": self.beta, "beta_warmup_epochs": self.beta_warmup_epochs} if self.method in TERMS else {}
        shown |= {"share": adversary.share} if adversary.share < 1 else {}
        shown |= {"start_epoch": adversary.start_epoch} if adversary.start_epoch else {}
        shown |= {} if self.awp is None else {"awp": self.awp, "awp_start_epoch": self.awp_start_epoch}
        if self.teacher is not None:
            shown |= {"teacher": str(self.teacher), "teacher_weight": self.teacher.weight}
        shown |= {"warmup_epochs": adversary.warmup_epochs, "craft_mode": adversary.craft_mode}
        return {**shown, "overfitting": self.alarm.react, "seed": adversary.seed}

    # -- when ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.alarm.collapsed = False  # of another fit; a resumed one reads its own from the checkpoint

    def attach(self, trainer: Any, pl_module: Any) -> None:
        self.adversary.begin(trainer)
        self._checked = False
        if any(type(c).__name__ in ("LearningRateFinder", "BatchSizeFinder") for c in trainer.callbacks):
            self.say(trainer, f"{self}: tuners run without callbacks, so what they find is fitted to clean training.")
        if self.awp is not None and (self.by_hand or is_sharded(pl_module)):
            raise ValueError(
                f"{self}: awp= moves the weights before the step runs, which "
                + ("a step with by_hand = True cannot have" if self.by_hand else "sharded weights cannot have")
                + "; leave it out, or train "
                + ("with the callback instead." if self.by_hand else "with another strategy (DDP).")
            )
        if self.teacher is not None:
            self.on_detach(self.teacher.prepare(pl_module.device))
        adds = self.method in TERMS or self.teacher is not None
        feeds = self.method in FEEDS
        handle = install(
            pl_module,
            str(self),
            feed=self._fed if feeds else None,
            before=None if feeds else self._craft,
            add=self._terms if adds else None,
            under=None if self.awp is None else self._worst_weights,
            watched=self.probe.logits_fn is None,
            loss_index=self.probe.loss_index,
            adversary=True,
            by_hand=self.by_hand,
        )
        self.on_detach(handle.detach)
        self.on_detach(self._forget)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.adversary.next_batch(batch_idx)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self.awp is not None:
            leave_weights(pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.adversary.active and self.alarm.due(trainer):
            grown = self.adversary.done >= self.adversary.start_epoch + self.adversary.warmup_epochs
            for metric, value in self.alarm.measure(trainer, self.probe, self, grown).items():
                pl_module.log(self.key("train", metric), value, sync_dist=trainer.world_size > 1)

    def state_dict(self) -> dict[str, Any]:
        return {"collapsed": self.alarm.collapsed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.alarm.collapsed = bool(state_dict.get("collapsed", False))

    def _forget(self) -> None:
        self.adversary.forget()
        self.alarm.held.forget()
        self._clean = None

    def __str__(self) -> str:
        return f"AdversarialTraining({self.method})"

    # -- what ----------------------------------------------------------------------------------------------------

    def _fed(self, step: Step) -> Any:
        self._craft(step)
        if not self.adversary.active:
            return step.batch
        # A copy: the step may write into its batch, and LBFGS calls it again with the same perturbation.
        return rebuilt(step.batch, self.probe.routes[step.name].inputs.into(step.batch, self._perturbed().clone()))

    def _craft(self, step: Step) -> None:
        if not self.adversary.active:
            if not self._checked:  # what cannot work must not show in the first epoch that is attacked
                with self.probe.reading(step, training=False) as reading:
                    self._first_batch(step, reading)
            return
        if self.adversary.crafted is not None:
            return
        self._clean = step
        crafted = self.adversary.craft(step, self.probe, self.alarm.remedy or self.attack, self._first_batch)
        self.alarm.hold(self.adversary.trainer, step, len(crafted))
        if self.threat is not None:
            self._count_outside(step, self.threat)

    def _terms(self, step: Step, call: LossCall | None, state: RandomState) -> Mapping[str, Tensor]:
        """What is added to the loss of the step, which ran on the attacked batch, with ``trades`` on the clean one."""
        if not self.adversary.active or self._clean is None:
            return {}
        feeds, other = self.method in FEEDS, None
        if self.probe.logits_fn is not None:
            call = self._read(step, None, state)
        if call is None:
            raise ProbeError(
                f"{self}: this step called no loss, though the first one did; give logits_fn= and target_key=."
            )
        if self.method == "trades":
            other = self._read(step, self._perturbed(), state)
        elif self.method == "mart":
            other = self._read(self._clean, None, state)
        clean, attacked = (other, call) if feeds else (call, other)
        terms = self._weighted(clean, attacked if attacked is not None else call)
        logged: dict[str, Any] = {name: term.detach() for name, term in terms.items()}
        if clean is not None:
            logged |= {"kl_weight": self._beta_now, "clean_loss": mean_loss(clean).detach()}
        for metric, value in logged.items():
            self._log(step.module, metric, value, len(self._perturbed()))
        return terms

    def _read(self, step: Step, x: Tensor | None, state: RandomState) -> LossCall:
        # As they are in this step: train mode, dropout masks and mixup replayed, BatchNorm sees this batch too.
        with self.probe.reading(step, training=None, keep_buffers=True, state=state) as reading:
            return reading.read(reading.x if x is None else x)

    def _weighted(self, clean: LossCall | None, attacked: LossCall) -> dict[str, Tensor]:
        """The terms of this method, weighted as they are now."""
        terms = {} if clean is None else TERMS[self.method](clean, attacked, self._beta_now)
        if self.teacher is not None:
            terms |= distillation(self._taught(self.teacher, attacked), attacked, self.teacher.weight)
        return terms

    @property
    def _beta_now(self) -> float:
        return self.beta * warm(self.adversary.done, self.beta_warmup_epochs, self.adversary.start_epoch)

    def _taught(self, teacher: Teacher, attacked: LossCall) -> Tensor:
        """What the teacher says of the clean input."""
        step = self._clean
        if step is None:
            raise RuntimeError(f"{self} was asked for its teacher outside of a training step.")
        return teacher.logits(self.probe.routes[step.name].inputs.of(step.batch), attacked.logits, self)

    @contextmanager
    def _worst_weights(self, step: Step) -> Iterator[None]:
        """The step runs at the weights, near by, where its loss is largest; the optimizer moves the real ones."""
        adversary = self.adversary
        if not adversary.active or adversary.trainer.current_epoch < self.awp_start_epoch:
            yield
            return
        if self.method not in FEEDS:
            self._craft(step)
        with self.probe.reading(step, training=None) as reading:
            call, other = reading.read(reading.x), None
            if self.method == "trades":
                other = reading.read(self._perturbed())
            elif self.method == "mart" and self._clean is not None:
                other = reading.read(self.probe.routes[step.name].inputs.of(self._clean.batch))
            clean, attacked = (other, call) if self.method in FEEDS else (call, other)
            terms = self._weighted(clean, attacked if attacked is not None else call)
            loss = mean_loss(call) + sum(terms.values())
            gradients = steepest_weights(loss, step.module, adversary.trainer)
        with at_worst_weights(step.module, gradients, self.awp or 0.0):
            yield

    # -- what the user hears -------------------------------------------------------------------------------------

    def _first_batch(self, step: Step, reading: Reading) -> None:
        if self._checked:
            return
        self._checked = True
        if self.threat is not None:
            reading.threat(self.threat).pixels.check(reading.x)
        with torch.no_grad():
            logits = reading.read(reading.x).logits
        broken = logits.isnan() | (logits == torch.inf)  # -inf is a class that is switched off
        if bool(broken.any()):
            raise ValueError(
                f"{self}: expected finite logits, got {int(broken.sum())} NaN or infinite values for the "
                "first batch. The weights are not finite, or a layer divides by zero or overflows on clean inputs."
            )
        lines = [
            f"{self}: {name_of(self.attack)}, {reading.found}",
            "" if self.threat is None else in_model_units(self.threat),
            self._cost(step.module),
            f"attacks from epoch {self.adversary.start_epoch} on" if not self.adversary.active else "",
            "metrics logged by training_step are computed on "
            + ("the attacked batch" if self.method in FEEDS else "the clean batch"),
        ]
        self.say(self.adversary.trainer, "; ".join(line for line in lines if line) + ".")

    def _cost(self, module: nn.Module) -> str:
        adds = self.method in TERMS
        # The step's own forward gives no logits where logits_fn= has to.
        again = self.probe.logits_fn is not None and (adds or self.teacher is not None)
        norms = sum(isinstance(part, _BatchNorm) for part in module.modules())
        seen = 1 + adds + again
        batch_norm = f"BatchNorm sees {seen} forward{'s' if seen > 1 else ''} a step" if norms else ""
        cost = self._step_cost()
        steps = "" if cost is None else f"about {cost:.1f} times the cost of a clean step"
        return ", ".join(filter(None, (steps, batch_norm)))

    def _step_cost(self) -> float | None:
        """A training step in multiples of a clean one; None where the attack is a foreign one."""
        adds = self.method in TERMS
        extra = (0.0 if self.awp is None else 1.0 + adds) + (self.teacher is not None) / 3
        cost = cost_of(self.attack, self.adversary.share, adds)
        return None if cost is None else cost + extra

    def _count_outside(self, step: Step, threat: ThreatModel | JointThreat) -> None:
        inputs = self.probe.routes[step.name].inputs
        x = inputs.of(step.batch)
        space = side_by_side(threat, inputs.shapes(step.batch)).pixels
        outside = self.adversary.count_outside(x, space, self.key("train", "outside_box"))
        if outside:
            self._log(step.module, "outside_box", float(outside), len(x), reduce_fx="sum")

    def _log(self, module: Any, metric: str, value: Any, batch_size: int, reduce_fx: str = "mean") -> None:
        module.log(
            self.key("train", metric), value, on_step=False, on_epoch=True, batch_size=batch_size, reduce_fx=reduce_fx
        )

    def _perturbed(self) -> Tensor:
        if self.adversary.crafted is None:
            raise RuntimeError(f"{self} was asked for perturbed inputs before the batch was crafted.")
        return self.adversary.crafted
