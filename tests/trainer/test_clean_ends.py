"""However a fit ends, with every callback attached: nothing of ours is left on the user's module."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch import nn
from trainer_runs import Slow, data, defence, monitors

CALLBACK_HOOKS = [
    "on_fit_start",
    "on_sanity_check_start",
    "on_sanity_check_end",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
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
]
MODULE_HOOKS = [
    *("training_step", "validation_step", "configure_optimizers", "optimizer_step", "train_dataloader", "backward"),
    *("on_after_batch_transfer", "on_train_batch_start", "on_validation_epoch_end", "on_save_checkpoint"),
]


class StopError(Exception):
    pass


def anatomy(module: nn.Module) -> dict[str, Any]:
    """What a module consists of, apart from the numbers in it."""
    return {
        name: (
            sorted(vars(part)),
            [len(vars(part)[key]) for key in sorted(vars(part)) if key.endswith("_hooks")],
            part.training,
            [(key, p.requires_grad, p.grad is None) for key, p in part.named_parameters(recurse=False)],
        )
        for name, part in module.named_modules()
    }


class Crashing(Slow):
    """Fails in one of its own hooks."""

    def __init__(self, hook: str = "", error: type[BaseException] = StopError) -> None:
        super().__init__()
        if hook:
            own = getattr(self, hook)

            def crash(*args: Any, **kwargs: Any) -> Any:
                if hook in ("training_step", "validation_step"):
                    own(*args, **kwargs)  # behind the loss: a step that is read does not come so far
                    if self.trainer.sanity_checking:
                        return
                raise error(hook)

            vars(self)[hook] = crash

    def train_dataloader(self) -> Any:
        return data()

    def val_dataloader(self) -> Any:
        return data()


def crashing(hook: str, error: type[BaseException]) -> pl.Callback:
    def crash(self: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if not trainer.sanity_checking or "sanity" in hook:
            raise error(hook)

    return type("CrashingCallback", (pl.Callback,), {hook: crash})()


def ended(module: pl.LightningModule, callbacks: list[Any], folder: Any, error: type[BaseException]) -> dict[str, Any]:
    """The anatomy of a module after a fit that failed."""
    keep = pl.callbacks.ModelCheckpoint(folder)
    with pytest.raises((error, SystemExit)):
        zoo.trainer(callbacks=[*callbacks, keep], enable_checkpointing=True).fit(module)
    assert not torch.overrides._get_current_function_mode_stack()
    assert torch.is_grad_enabled()
    return anatomy(module)


@pytest.mark.parametrize("first", [False, True], ids=["behind ours", "before ours"])
@pytest.mark.parametrize("hook", CALLBACK_HOOKS)
def test_a_callback_that_fails_leaves_what_it_leaves_without_us(hook: str, first: bool, tmp_path: Any) -> None:
    ours = [*defence("trades and penalty" if first else "madry"), *monitors()]
    theirs = [crashing(hook, StopError)]
    expected = ended(zoo.built(Crashing), theirs, tmp_path / "without", StopError)
    module = zoo.built(Crashing)
    assert ended(module, theirs + ours if first else ours + theirs, tmp_path / "with", StopError) == expected
    module.train()  # a crash in a validation leaves it in eval mode, with us or without
    zoo.trainer(callbacks=ours).fit(module)  # the same module and callbacks once more
    assert {key for key in vars(module) if "robust" in key} == set()
    assert "training_step" not in vars(module)


@pytest.mark.parametrize("hook", MODULE_HOOKS)
def test_a_module_that_fails_is_left_as_it_is_without_us(hook: str, tmp_path: Any) -> None:
    expected = ended(zoo.built(lambda: Crashing(hook)), [], tmp_path / "without", StopError)
    ours = [*defence("trades and penalty"), *monitors()]
    assert ended(zoo.built(lambda: Crashing(hook)), ours, tmp_path / "with", StopError) == expected


@pytest.mark.parametrize(
    "hook", ["on_train_batch_end", "on_before_backward", "on_validation_batch_end", "on_train_end"]
)
def test_ctrl_c_leaves_what_it_leaves_without_us(hook: str, tmp_path: Any) -> None:
    theirs = [crashing(hook, KeyboardInterrupt)]
    expected = ended(zoo.built(Crashing), theirs, tmp_path / "without", KeyboardInterrupt)
    ours = [*defence("trades and penalty"), *monitors()]
    assert ended(zoo.built(Crashing), ours + theirs, tmp_path / "with", KeyboardInterrupt) == expected
