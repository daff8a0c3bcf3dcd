"""Half precision in one process: training in that of the run, robust evaluation in fp32, losses scaled for fp16."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from pytorch_lightning.plugins import MixedPrecision
from steps_by_hand import loss_by_hand
from torch import Tensor
from trainer_runs import METHODS, THREAT, Net, Slow, data, defence, flat, monitors, offline, ours

from lightning_robust import AdversarialTraining, RobustAccuracy


class Seen:
    """An attack that does nothing but look at the precision in which it may query."""

    threat = THREAT
    name = "seen"
    reach = THREAT.eps

    def __init__(self, module: Any) -> None:
        self.dtypes: set[torch.dtype] = set()
        self.looking = False
        module.net[-1].register_forward_hook(self._note)

    def _note(self, _module: Any, _args: Any, output: Tensor) -> None:
        if self.looking:
            self.dtypes.add(output.dtype)

    def __call__(self, logits_fn: Any, x: Tensor, y: Tensor, **_: Any) -> Tensor:
        self.looking = True
        logits_fn(x)
        self.looking = False
        return x


def fp16(scale: float) -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


def step_and_hand(
    method: str, half: torch.dtype, scale: float, *others: Any, **settings: Any
) -> tuple[Tensor, Tensor, Any]:
    """What the first optimizer step took away, the same by hand at the batch that the run crafted, and the Trainer."""
    crafted: list[Tensor] = []

    class Keeping(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            crafted.extend(c._perturbed().clone() for c in trainer.callbacks if isinstance(c, AdversarialTraining))

    module = zoo.built(Net)
    before = copy.deepcopy(module)
    trainer = zoo.trainer(max_steps=1, callbacks=[*defence(method), *others, Keeping()], **settings)
    trainer.fit(module, data(), data())
    x, y = next(iter(data()))
    with torch.autocast("cpu", half):
        loss = loss_by_hand(before.net, x, y, method, found=crafted[0] if crafted else None)
    gradient = torch.autograd.grad(scale * loss, list(before.parameters()))
    return flat(before) - flat(module), torch.cat([g.flatten() for g in gradient]) / scale, trainer


def off(found: Tensor, expected: Tensor, half: torch.dtype) -> float:
    """How far apart, in roundings of the type: shared forwards sum their gradients in another order than by hand."""
    return float((found - expected).norm() / expected.norm()) / torch.finfo(half).eps


@pytest.mark.parametrize("method", METHODS)
def test_bf16_mixed_takes_the_gradient_under_autocast(method: str) -> None:
    found, expected, trainer = step_and_hand(method, torch.bfloat16, 1.0, *monitors(), precision="bf16-mixed")
    assert off(found, expected, torch.bfloat16) < 2  # 18 without the penalty, 87 without the divergence
    assert all(math.isfinite(value) for key, value in ours(trainer).items() if "val" in key)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_attacks_query_in_the_precision_of_the_run_and_evaluation_in_fp32(precision: Any) -> None:
    module = zoo.built(Slow)
    training, evaluation = Seen(module), Seen(module)
    callbacks = [AdversarialTraining(training), RobustAccuracy(evaluation)]
    trainer = zoo.trainer(precision=precision, callbacks=callbacks)
    trainer.fit(module, data(), data())
    assert training.dtypes == {torch.float32 if precision == "32-true" else torch.bfloat16}
    assert evaluation.dtypes == {torch.float32}
    fit = offline(module, data())
    assert ours(trainer)["robust/val/clean_accuracy"] == pytest.approx(fit["robust/val/clean_accuracy"])


@pytest.mark.parametrize("scale", [2.0**6, 2.0**10])
@pytest.mark.parametrize("method", METHODS)
def test_fp16_scales_what_is_added_with_the_loss_so_that_the_scale_cancels(method: str, scale: float) -> None:
    found, expected, _ = step_and_hand(method, torch.float16, scale, **fp16(scale))
    assert off(found, expected, torch.float16) < 2


class Steps(pl.Callback):
    """The weights and the scale after every batch."""

    def __init__(self, scaler: Any) -> None:
        self.scaler = scaler
        self.states: list[tuple[Tensor, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.states.append((flat(pl_module), self.scaler.get_scale()))


@pytest.mark.parametrize("method", METHODS)
def test_steps_skipped_for_an_overflow_leave_the_weights_and_the_next_ones_are_taken(method: str) -> None:
    module = zoo.built(Slow)
    start, settings = flat(module), fp16(2.0**30)
    steps = Steps(settings["plugins"][0].scaler)
    trainer = zoo.trainer(max_epochs=10, callbacks=[*defence(method), *monitors(), steps], **settings)
    trainer.fit(module, data(), data())
    taken = [torch.equal(state, start) for state, _ in steps.states].index(False)
    assert 3 < taken < 29
    assert [scale for _, scale in steps.states[: taken + 1]] == [
        *(2.0 ** (30 - i) for i in range(1, taken + 1)),  # halved once for each step that was skipped
        2.0 ** (30 - taken),
    ]
    assert bool(torch.isfinite(flat(module)).all())
    assert all(math.isfinite(value) for key, value in ours(trainer).items() if "val" in key)
    assert ours(trainer)["robust/val/accuracy"] == pytest.approx(offline(module, data())["robust/val/accuracy"])
