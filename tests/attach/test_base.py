"""The callback base: both namespaces, and a clean module however a fit ends."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as new
import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import PGD, AdversarialTraining, RobustAccuracy, ThreatModel
from lightning_robust.attach.base import shows_images

THREAT = ThreatModel("linf", 0.1)
HOOKS = [
    "on_fit_start",
    "on_sanity_check_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_train_epoch_end",
    "on_save_checkpoint",
    "on_train_end",
    "on_fit_end",
]


def data() -> Any:
    return DataLoader(TensorDataset(zoo.images(32), zoo.labels(32)), 16)


def traces(module: nn.Module) -> list[str]:
    """Everything of ours, or of a stopped read, that could be left on a module or in the process."""
    found = [
        name
        for name in vars(module)
        if name in ("training_step", "on_save_checkpoint", "log", "log_dict", "manual_backward")
    ]
    found += [name for name in vars(module) if "robust" in name]
    found += ["hook" for part in module.modules() if part._forward_hooks or part._forward_pre_hooks]
    found += [str(mode) for mode in torch.overrides._get_current_function_mode_stack()]
    return found


def crashing(hook: str, exception: type[BaseException]) -> pl.Callback:
    def crash(self: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if not trainer.sanity_checking or hook == "on_sanity_check_start":
            raise exception(hook)

    return type("Crashing", (pl.Callback,), {hook: crash})()


@pytest.mark.parametrize("method", ["madry", "trades"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_crash_in_any_hook_leaves_the_module_clean(hook: str, method: str, tmp_path: Any) -> None:
    module = zoo.built(zoo.ListBatch)
    ours = [AdversarialTraining(PGD(THREAT, steps=1), method), RobustAccuracy(PGD(THREAT, steps=1))]
    callbacks = [*ours, crashing(hook, ArithmeticError), pl.callbacks.ModelCheckpoint(tmp_path)]
    with pytest.raises(ArithmeticError, match=hook):
        zoo.trainer(callbacks=callbacks, enable_checkpointing=True).fit(module, data(), data())
    assert traces(module) == []


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_start"])
def test_ctrl_c_leaves_the_module_clean(hook: str) -> None:
    module = zoo.built(zoo.ListBatch)
    ours = [AdversarialTraining(PGD(THREAT, steps=1)), RobustAccuracy(PGD(THREAT, steps=1))]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        zoo.trainer(callbacks=[*ours, crashing(hook, KeyboardInterrupt)]).fit(module, data(), data())
    assert traces(module) == []


def test_an_exception_inside_the_users_step_leaves_the_module_clean() -> None:
    class Failing(zoo.ListBatch):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1 and self.training:
                raise ArithmeticError("mine")
            return super().training_step(batch, batch_idx)

    module = zoo.built(Failing)
    with pytest.raises(ArithmeticError, match="mine"):
        zoo.trainer(callbacks=[AdversarialTraining(PGD(THREAT, steps=1))]).fit(module, data())
    assert traces(module) == []
    assert module.training


def test_fit_twice_and_a_clean_module_in_between() -> None:
    module = zoo.built(zoo.ListBatch)
    callbacks = [AdversarialTraining(PGD(THREAT, steps=1)), RobustAccuracy(PGD(THREAT, steps=1))]
    for _ in range(2):
        zoo.trainer(callbacks=callbacks).fit(module, data(), data())
        assert traces(module) == []


class NewModule(new.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = zoo.network()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class OldModule(zoo.ListBatch):
    pass


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("namespace", [pl, new], ids=["pytorch_lightning", "lightning.pytorch"])
def test_callbacks_serve_both_namespaces_also_outside_of_a_list(namespace: Any, bare: bool) -> None:
    namespace.seed_everything(0, verbose=False)
    module = OldModule() if namespace is pl else NewModule()
    callback: Any = AdversarialTraining(PGD(THREAT, steps=1))
    trainer = namespace.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=callback if bare else [callback, RobustAccuracy(PGD(THREAT, steps=1))],
    )  # fmt: skip
    trainer.fit(module, data(), data())
    assert ("robust/val/accuracy" in trainer.callback_metrics) is not bare
    assert traces(module) == []


def test_both_namespaces_train_the_same_weights() -> None:
    weights = []
    for namespace, kind in ((pl, OldModule), (new, NewModule)):
        namespace.seed_everything(0, verbose=False)
        module = kind()
        trainer = namespace.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, callbacks=[AdversarialTraining(PGD(THREAT, steps=2), "trades")],
        )  # fmt: skip
        trainer.fit(module, data())
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)


def test_what_was_found_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning_robust"):
        module = zoo.built(zoo.DictBatchWithExtras)
        callback = AdversarialTraining(PGD(THREAT, steps=7))
        zoo.trainer(max_epochs=2, callbacks=[callback]).fit(module, zoo.loader(zoo.DictBatchWithExtras))
    (line,) = [record.getMessage() for record in caplog.records if record.name == "lightning_robust"]
    for words in (
        "batch['image'] (16, 1, 8, 8)",
        "batch['label']",
        "cross_entropy",
        "'net'",
        "6.4 times",
        "BatchNorm sees 1",
    ):
        assert words in line


@pytest.mark.parametrize(("logger", "takes"), [("tensorboard", True), ("csv", False), ("none", False)])
def test_pictures_are_drawn_where_a_logger_takes_them(logger: str, takes: bool, tmp_path: Any) -> None:
    kinds = {"tensorboard": pl.loggers.TensorBoardLogger, "csv": pl.loggers.CSVLogger}
    trainer = pl.Trainer(logger=kinds[logger](tmp_path) if logger in kinds else False, accelerator="cpu")
    assert shows_images(trainer) is takes
