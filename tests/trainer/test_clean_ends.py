"""A crash or Ctrl-C in any hook of a fit, every callback attached: what is left is what is left without them."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.data import DataLoader, TensorDataset
from trainer_runs import ATTACK, Net, defence

from lightning_robust import (
    CalibrationMonitor,
    CorruptionMonitor,
    OODMonitor,
    RobustAccuracy,
    SaliencySnapshots,
    TemperatureScaling,
)

# A monitor that reads a step which crashes says so, and the crash of the step itself follows.
pytestmark = pytest.mark.filterwarnings("ignore:.*failed in val:UserWarning")

EVERYBODYS = [
    "setup",
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_save_checkpoint",
    "on_train_end",
    "on_fit_end",
    "teardown",
]
# With a plus: behind what the module does there.
MODULES = [
    "configure_optimizers",
    "training_step",
    "training_step+",
    "backward",
    "backward+",
    "optimizer_step",
    "optimizer_step+",
    "optimizer_zero_grad",
    "on_after_batch_transfer",
    "validation_step",
    "validation_step+",
    "on_validation_model_eval+",
    "on_validation_model_train",
]
CALLBACKS = ["on_sanity_check_start", "on_sanity_check_end"]
DATA = ["training data", "validation data"]
PLACES = [
    *((hook, ("callback before", "callback behind", "module")) for hook in EVERYBODYS),
    *((hook, ("module",)) for hook in MODULES),
    *((hook, ("callback before", "callback behind")) for hook in CALLBACKS),
    *((hook, ("data",)) for hook in DATA),
]


class Scaled(Net):
    """No submodule gives these logits: monitors hear the loss call itself, by a mode of the whole process."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(2 * self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


METHODS = {"madry and penalty": Net, "trades and penalty": Scaled}


class CrashError(ArithmeticError):
    """Nobody else's."""


class Plan:
    """Who crashes in the next fit, and how."""

    who: str | None = None
    exception: type[BaseException] = CrashError

    def meet(self, who: str, where: str) -> None:
        if who == self.who:
            raise self.exception(where)


def crashing(cls: type[Any], hook: str, who: str, plan: Plan) -> type[Any]:
    """A subclass that follows the plan in one hook."""
    name = hook.rstrip("+")
    if not hasattr(cls, name):
        return cls
    original = getattr(cls, name)

    def crash(self: Any, *args: Any, **kwargs: Any) -> Any:
        if hook == name:
            plan.meet(who, hook)
        result = original(self, *args, **kwargs)
        if hook != name:
            plan.meet(who, hook)
        return result

    # Lightning decides by the signature what a step gets, and takes an unwrapped hook for its own.
    return type("Crashing", (cls,), {name: functools.wraps(original)(crash) if "ing_step" in name else crash})


class Images(TensorDataset):
    def __init__(self, who: str, plan: Plan) -> None:
        super().__init__(zoo.images(8), zoo.labels(8))
        self.who, self.plan = who, plan

    def __getitem__(self, index: Any) -> Any:
        self.plan.meet(self.who, "data")
        return super().__getitem__(index)


def every(method: str) -> list[Any]:
    """All callbacks there are, at their cheapest."""
    return [
        *defence(method),
        RobustAccuracy(ATTACK, max_samples=4),
        CalibrationMonitor(),
        OODMonitor({"other": TensorDataset(zoo.images(4, 9), zoo.labels(4))}, scores=["msp"]),
        CorruptionMonitor(corruptions=["contrast"], severities=[3], max_samples=4),
        TemperatureScaling(),
        SaliencySnapshots(methods=["gradient"], samples=2),
    ]


def traces(module: nn.Module) -> dict[str, Any]:
    """Whatever callbacks could leave on a module or in the process."""
    found: dict[str, Any] = {
        "function modes": [str(mode) for mode in torch.overrides._get_current_function_mode_stack()],
        "dispatch modes": [str(mode) for mode in _get_current_dispatch_mode_stack()],
        "gradients on": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "random numbers": torch.get_rng_state().tolist(),
    }
    for name, part in module.named_modules():
        found[f"{name}: attributes"] = sorted(vars(part))
        found[f"{name}: hooks"] = {key: len(value) for key, value in vars(part).items() if key.endswith("_hooks")}
        found[f"{name}: training"] = part.training
    for name, p in module.named_parameters():
        found[f"{name}: trained"] = (p.requires_grad, p.grad is not None, p.is_leaf)
        found[f"{name}: hooks"] = (len(p._backward_hooks or ()), len(p._post_accumulate_grad_hooks or ()))
    return found


class Run:
    """One module and one set of callbacks, fitted again and again by a plan."""

    def __init__(self, hook: str, shape: type[Net], ours: list[Any], tmp_path: Any) -> None:
        self.plan, self.hook, self.path = Plan(), hook, tmp_path
        before, behind = (
            crashing(pl.Callback, hook, f"callback {where}", self.plan)() for where in ("before", "behind")
        )
        self.callbacks = [before, *ours, behind]
        self.module = zoo.built(crashing(shape, hook, "module", self.plan))

    def loader(self, name: str) -> DataLoader[Any]:
        return DataLoader(Images("data" if name == self.hook else "nobody", self.plan), 8)

    def fit(self, who: str | None, exception: type[BaseException] = CrashError) -> pl.Trainer:
        saving = self.hook == "on_save_checkpoint"
        trainer = zoo.trainer(
            callbacks=[*self.callbacks, *([pl.callbacks.ModelCheckpoint(self.path)] if saving else [])],
            enable_checkpointing=saving,
            num_sanity_val_steps=int("sanity" in self.hook),
        )
        torch.manual_seed(0)
        self.module.train()  # Lightning leaves eval mode behind where it was validating
        self.plan.who, self.plan.exception = who, exception
        loaders = self.loader("training data"), self.loader("validation data")
        if who is None:
            trainer.fit(self.module, *loaders)
            return trainer
        # Lightning makes SystemExit of Ctrl-C, or, in some versions, a fit that ends early.
        with pytest.raises(CrashError if exception is CrashError else (KeyboardInterrupt, SystemExit)):
            trainer.fit(self.module, *loaders)
        return trainer


@pytest.fixture(autouse=True)
def _ctrl_c() -> Iterator[None]:
    """Lightning switches Ctrl-C off when it was pressed."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize(
    ("method", "exception"),
    [
        ("madry and penalty", CrashError),
        ("trades and penalty", KeyboardInterrupt),
        pytest.param("madry and penalty", KeyboardInterrupt, marks=pytest.mark.slow),
        pytest.param("trades and penalty", CrashError, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("hook", "who"), PLACES, ids=[hook for hook, _ in PLACES])
def test_a_crash_anywhere_leaves_what_it_leaves_without_us_and_the_next_fit_works(
    hook: str, who: tuple[str, ...], method: str, exception: type[BaseException], tmp_path: Any
) -> None:
    with_us = Run(hook, METHODS[method], every(method), tmp_path / "with")
    without = Run(hook, METHODS[method], [], tmp_path / "without")
    for thrower in who:
        without.fit(thrower, exception)
        expected = traces(without.module)  # before ours run: modes are of the whole process
        with_us.fit(thrower, exception)
        assert traces(with_us.module) == expected, f"{hook} of {thrower}"
    without.fit(None)
    expected = traces(without.module)
    trainer = with_us.fit(None)
    assert traces(with_us.module) == expected
    assert trainer.global_step == 1
    assert {"robust/train/input_gradient", "robust/val/accuracy", "saliency/val/flips"} <= set(trainer.callback_metrics)


class Counting(Net):
    """Ctrl-C in one forward of a fit, whoever asked for it."""

    count, last = 0, 0
    state = (False, False)  # whether Lightning was evaluating then, and whether it had trained

    def forward(self, x: Any) -> Any:
        Counting.count += 1
        if self.count == self.last:
            Counting.state = (self.trainer.sanity_checking or self.trainer.validating, self.trainer.global_step > 0)
            raise KeyboardInterrupt
        return super().forward(x)


def counted(callbacks: list[Any], last: int) -> Counting:
    Counting.count, Counting.last = 0, last
    module, batches = zoo.built(Counting), DataLoader(TensorDataset(zoo.images(8), zoo.labels(8)), 8)
    trainer = zoo.trainer(callbacks=callbacks, num_sanity_val_steps=1)
    if last:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            trainer.fit(module, batches, batches)
        assert Counting.count == last  # nobody takes Ctrl-C for a failure of its own, and goes on
    else:
        trainer.fit(module, batches, batches)
    return module


@pytest.mark.parametrize("method", METHODS)
def test_ctrl_c_in_any_forward_whoever_runs_it_leaves_the_module_clean(method: str) -> None:
    counted([], 0)
    without = Counting.count
    references = {}
    for last in range(1, without + 1):
        module = counted([], last)
        references[Counting.state] = traces(module)
    assert len(references) == without == 3  # sanity check, training, validation
    counted(every(method), 0)
    forwards = Counting.count
    assert forwards > 5 * without
    seen = set()
    for last in range(1, forwards + 1):
        module = counted(every(method), last)
        seen.add(Counting.state)
        found, expected = traces(module), references.get(Counting.state)
        if (
            expected is None
        ):  # at the end of an epoch, when Lightning has trained and evaluated and is back in train mode
            back = {name: True for name in references[True, True] if name.endswith(": training")}
            expected = {**references[True, True], **back}
        assert found == expected, f"forward {last} of {forwards}"
    assert seen == {*references, (False, True)}
