"""Small networks and a plain LightningModule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust.demo import Classifier, SmallCNN
from lightning_robust.demo.nets import MLP, PlainCNN

NETS = {"cnn": SmallCNN, "plain-cnn": PlainCNN, "gelu-cnn": PlainCNN, "mlp": MLP}


@pytest.mark.parametrize("net", [SmallCNN, PlainCNN, MLP])
@pytest.mark.parametrize(("channels", "classes", "size"), [(1, 10, 28), (3, 10, 32), (2, 5, 8)])
def test_logits_have_one_column_a_class(
    net: type[SmallCNN | PlainCNN | MLP], channels: int, classes: int, size: int
) -> None:
    assert net(channels, classes, size)(torch.zeros(2, channels, size, size)).shape == (2, classes)


def test_small_cnn_has_as_many_parameters_as_its_docstring_implies() -> None:
    convolutions = 9 * (1 * 32 + 32 * 32 + 32 * 64 + 64 * 64)
    norms, linear = 2 * (32 + 32 + 64 + 64), 64 * 7 * 7 * 10 + 10
    assert sum(p.numel() for p in SmallCNN().parameters()) == convolutions + norms + linear == 96_554


def test_plain_cnn_has_as_many_parameters_as_its_docstring_implies() -> None:
    convolutions = 9 * 1 * 16 + 16 + 9 * 16 * 32 + 32
    assert sum(p.numel() for p in PlainCNN().parameters()) == convolutions + 32 * 7 * 7 * 64 + 64 + 64 * 10 + 10


def test_the_mlp_has_the_hidden_layers_of_the_paper() -> None:
    assert [layer.out_features for layer in MLP() if isinstance(layer, nn.Linear)] == [50, 30, 10]


@pytest.mark.parametrize("net", [PlainCNN, MLP])
def test_the_nets_of_the_shortcut_have_no_batch_norm(net: type[PlainCNN | MLP]) -> None:
    assert not list(net().buffers())


@pytest.mark.parametrize("net", NETS)
def test_classifier_has_the_net_that_its_name_says(net: str) -> None:
    assert type(Classifier(size=8, net=net).net) is NETS[net]  # type: ignore[arg-type]  # a Literal


@pytest.mark.parametrize(("net", "activation"), [("plain-cnn", nn.ReLU), ("gelu-cnn", nn.GELU)])
def test_the_two_plain_cnns_differ_in_their_activation_alone(net: str, activation: type[nn.Module]) -> None:
    layers = list(Classifier(size=8, net=net).net.children())  # type: ignore[arg-type]  # a Literal
    expected = [nn.Conv2d, activation, nn.Conv2d, activation, nn.Flatten, nn.Linear, activation, nn.Linear]
    assert [type(layer) for layer in layers] == expected


def test_a_net_that_there_is_not_is_an_error_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"one of 'cnn', 'plain-cnn', 'gelu-cnn', 'mlp', got 'resnet'"):
        Classifier(net="resnet")  # type: ignore[arg-type]  # what a user may write


def test_classifier_trains_a_step_and_logs(tmp_path: Path) -> None:
    module = Classifier(lr=0.01, channels=2, classes=3, size=8)
    before = [p.detach().clone() for p in module.parameters()]
    loader = DataLoader(TensorDataset(torch.rand(8, 2, 8, 8), torch.arange(8) % 3), batch_size=4)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    trainer = Trainer(default_root_dir=str(tmp_path), fast_dev_run=1, **quiet)
    trainer.fit(module, loader, loader)
    assert trainer.global_step == 1
    assert not any(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
    assert {"train/loss", "val/loss", "val/accuracy"} <= set(trainer.callback_metrics)
    trainer.test(module, loader, verbose=False)
    assert {"test/loss", "test/accuracy"} <= set(trainer.callback_metrics)


def test_the_learning_rate_goes_up_and_down_over_the_whole_run(tmp_path: Path) -> None:
    module = Classifier(lr=0.01, channels=1, classes=3, size=8)
    loader = DataLoader(TensorDataset(torch.rand(40, 1, 8, 8), torch.arange(40) % 3), batch_size=4)
    rates: list[float] = []
    module.on_train_batch_start = lambda batch, i: rates.append(module.optimizers().param_groups[0]["lr"])
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    Trainer(default_root_dir=str(tmp_path), max_epochs=1, limit_val_batches=0, enable_checkpointing=False, **quiet).fit(
        module, loader
    )
    assert len(rates) == 10
    assert max(rates) == pytest.approx(0.01)
    assert rates[0] < 0.001
    assert rates[-1] < 0.001


@pytest.mark.parametrize("net", NETS)
def test_hyper_parameters_rebuild_the_classifier_from_a_checkpoint(tmp_path: Path, net: str) -> None:
    module = Classifier(lr=0.02, channels=2, classes=3, size=8, net=net)  # type: ignore[arg-type]  # a Literal
    trainer = Trainer(default_root_dir=str(tmp_path), logger=False, accelerator="cpu", enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = Classifier.load_from_checkpoint(tmp_path / "model.ckpt")
    assert dict(again.hparams) == {"lr": 0.02, "channels": 2, "classes": 3, "size": 8, "width": 32, "net": net}
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), again.parameters(), strict=True))
