"""One training batch under attack each epoch: by hand, without a trace in the training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo
from steps_by_hand import climbed, projected
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from trainer_runs import ATTACK, THREAT, Epochs, Net, Slow, weights

from lightning_robust import PGD, AdversarialTraining
from lightning_robust.randomness import seeded


@pytest.fixture(autouse=True)
def every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of epochs that are shorter than those the alarm is worth its cost in."""
    monkeypatch.setattr("lightning_robust.callbacks.overfitting.SHARE", 1e9)


def data(n: int = 256, batch_size: int = 32) -> DataLoader[Any]:
    """Noise over a pattern for each class, so that something can be learnt in a few steps."""
    x, y = 0.2 * zoo.images(n) + 0.8 * zoo.images(10, seed=1)[zoo.labels(n)], zoo.labels(n)
    return DataLoader(TensorDataset(x, y), batch_size, shuffle=True)


def under_pgd10(net: nn.Module, x: Tensor, y: Tensor, seed: int = 0) -> float:
    """Accuracy in eval mode under ten steps from a uniform start that is a function of (seed, rank)."""
    net = copy.deepcopy(net).eval()
    start = x + (2 * torch.rand(x.shape, generator=seeded(seed, 0)) - 1) * THREAT.eps
    found = start.clamp(0, 1)
    for _ in range(10):
        slope = climbed(lambda z: F.cross_entropy(net(z), y, reduction="none"), found)
        found = projected(found + 0.25 * THREAT.eps * slope, x)
    return float((net(found).argmax(1) == y).float().mean())


@pytest.mark.parametrize(("method", "seed"), [("madry", 0), ("trades", 0), ("mart", 3)])
def test_each_epoch_ends_with_the_accuracy_of_its_last_batch_under_pgd10(method: str, seed: int) -> None:
    attack = PGD(THREAT, steps=1)
    epochs = Epochs()
    callbacks = [AdversarialTraining(attack, method, seed=seed), epochs]
    module = zoo.built(Slow)
    zoo.trainer(max_epochs=3, callbacks=callbacks).fit(module, data())
    expected = [under_pgd10(net, *batch, seed) for net, batch in zip(epochs.nets, epochs.batches, strict=True)]
    assert [row["robust/train/accuracy"] for row in epochs.logged] == pytest.approx(expected, abs=1e-6)
    assert any(0 < accuracy < 1 for accuracy in expected)
    assert "robust/train/fgsm_accuracy" not in epochs.logged[0]  # for one-step methods


def test_with_one_step_methods_fgsm_accuracy_and_the_ratio_are_logged_too() -> None:
    epochs = Epochs()
    module = zoo.built(Slow)
    zoo.trainer(max_epochs=2, callbacks=[AdversarialTraining(THREAT, "n-fgsm"), epochs]).fit(module, data())
    for net, (x, y), row in zip(epochs.nets, epochs.batches, epochs.logged, strict=True):
        net.eval()
        found = (
            x + THREAT.eps * climbed(lambda z, net=net, y=y: F.cross_entropy(net(z), y, reduction="none"), x)
        ).clamp(0, 1)
        fgsm, pgd = float((net(found).argmax(1) == y).float().mean()), under_pgd10(net, x, y)
        assert row["robust/train/fgsm_accuracy"] == pytest.approx(fgsm, abs=1e-6)
        assert row["robust/train/accuracy"] == pytest.approx(pgd, abs=1e-6)
        assert row["robust/train/pgd_to_fgsm"] == pytest.approx(pgd / fgsm, rel=1e-5)


def test_steps_that_write_into_their_batch_do_not_reach_what_is_held() -> None:
    epochs = Epochs()
    shape = zoo.WritesIntoItsBatch
    zoo.trainer(callbacks=[AdversarialTraining(PGD(THREAT, steps=1)), epochs]).fit(zoo.built(shape), zoo.loader(shape))
    x, y = epochs.last
    inside = nn.Sequential(_Shifted(), epochs.nets[0])
    assert epochs.logged[0]["robust/train/accuracy"] == pytest.approx(under_pgd10(inside, x, y - 1), abs=1e-6)


class _Shifted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5) * 2


@pytest.mark.filterwarnings("ignore:.*catastrophic")  # of a network that is hardly trained; it changes nothing
@pytest.mark.parametrize("shape", [zoo.SideEffects, zoo.NumpyMixup])
@pytest.mark.parametrize("method", ["madry", "trades", "mart", "n-fgsm", "fgsm"])
def test_measuring_does_not_change_the_training_by_a_bit(method: str, shape: type[Any]) -> None:
    attack = THREAT if "fgsm" in method else PGD(THREAT, steps=1)
    hashes = []
    for overfitting in ("ignore", "warn"):
        module = zoo.built(shape)
        callback = AdversarialTraining(attack, method, overfitting=overfitting)
        trainer = zoo.trainer(max_epochs=3, callbacks=[callback])
        trainer.fit(module, data(48, 16))
        hashes.append(weights(module))
        assert ("robust/train/accuracy" in trainer.callback_metrics) == (overfitting == "warn")
    assert hashes[0] == hashes[1]


def test_of_a_foreign_attack_nothing_is_measured_and_nothing_is_held_after_a_fit() -> None:
    trainer = zoo.trainer(callbacks=[AdversarialTraining(lambda logits_fn, x, y: x)])
    trainer.fit(zoo.built(Net), data())
    assert "robust/train/accuracy" not in trainer.callback_metrics
    callback = AdversarialTraining(ATTACK)
    zoo.trainer(callbacks=[callback]).fit(zoo.built(Net), data())
    assert callback.alarm.held._step is None
    assert callback.alarm.held.accuracies(None, callback.probe, {}) == {}
