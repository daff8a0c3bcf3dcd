"""The alarm for overfitting to an attack: when it goes off, what it changes, and on real digits."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from trainer_runs import THREAT, Epochs, Net, Slow, weights

from lightning_robust import PGD, AdversarialTraining, RobustAccuracy, ThreatModel
from lightning_robust.callbacks.adversary import Adversary
from lightning_robust.callbacks.held_batch import HeldBatch
from lightning_robust.callbacks.overfitting import CATASTROPHIC


@pytest.fixture(autouse=True)
def every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of epochs that are shorter than those the alarm is worth its cost in."""
    monkeypatch.setattr("lightning_robust.callbacks.overfitting.SHARE", 1e9)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What is measured is what a test says."""
    values: dict[str, float] = {"held_clean_accuracy": 1.0}
    monkeypatch.setattr(HeldBatch, "accuracies", lambda *_: dict(values))
    return values


@pytest.fixture
def attacks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every attack that was run."""
    ran: list[Any] = []
    craft = Adversary.craft

    def watched(self: Adversary, step: Any, probe: Any, attack: Any, first: Any) -> Tensor:
        ran.append(attack)
        return craft(self, step, probe, attack, first)

    monkeypatch.setattr(Adversary, "craft", watched)
    return ran


def switching(**settings: Any) -> AdversarialTraining:
    return AdversarialTraining(THREAT, "fgsm", **{"overfitting": "switch", **settings})


def test_a_collapse_is_said_once_with_what_to_do(measured: dict[str, float], attacks: list[Any]) -> None:
    measured.update(accuracy=0.05, fgsm_accuracy=0.6)
    trainer = zoo.trainer(max_epochs=3, callbacks=[switching(overfitting="warn")])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(zoo.built(Net), zoo.loader(Net))
    (said,) = [str(entry.message) for entry in told if "catastrophic" in str(entry.message)]
    assert said.startswith(
        "AdversarialTraining(fgsm): catastrophic overfitting in epoch 0: on a training batch 60% are"
    )
    assert "5% under PGD-10" in said
    assert "overfitting='switch'" in said
    assert float(trainer.callback_metrics["robust/train/pgd_to_fgsm"]) == pytest.approx(0.05 / 0.6, rel=1e-5)
    assert {type(attack).__name__ for attack in attacks} == {"FGSM"}  # a warning changes nothing


def test_switching_goes_over_to_pgd_in_the_next_epoch(measured: dict[str, float], attacks: list[Any]) -> None:
    measured.update(accuracy=0.05, fgsm_accuracy=0.6)
    with pytest.warns(UserWarning, match=r"PGD with 10 steps takes over from here\."):
        zoo.trainer(max_epochs=2, callbacks=[switching()]).fit(zoo.built(Net), zoo.loader(Net))
    assert attacks == [switching().attack] * 2 + [PGD(THREAT, steps=10)] * 2


def test_a_resumed_fit_goes_on_with_pgd_to_the_last_bit(
    measured: dict[str, float], attacks: list[Any], tmp_path: Path
) -> None:
    measured.update(accuracy=0.05, fgsm_accuracy=0.6)
    whole, first, second = (zoo.built(Slow) for _ in range(3))
    with pytest.warns(UserWarning, match="catastrophic"):
        zoo.trainer(max_epochs=3, callbacks=[switching()]).fit(whole, zoo.loader(Slow))
    trainer = zoo.trainer(max_epochs=1, callbacks=[switching()])
    with pytest.warns(UserWarning, match="catastrophic"):
        trainer.fit(first, zoo.loader(Slow))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    attacks.clear()
    zoo.trainer(max_epochs=3, callbacks=[switching()]).fit(second, zoo.loader(Slow), ckpt_path=tmp_path / "x.ckpt")
    assert attacks == [PGD(THREAT, steps=10)] * 4  # and no second warning, which would be an error
    assert weights(second) == weights(whole)


SILENT: list[tuple[str, dict[str, float], dict[str, Any]]] = [
    ("sound", {"accuracy": 0.4, "fgsm_accuracy": 0.6}, {}),
    ("nothing learnt yet", {"accuracy": 0.0, "fgsm_accuracy": 0.0}, {}),
    ("below chance", {"accuracy": 0.0, "fgsm_accuracy": 0.03}, {}),
    ("clean accuracy first", {"accuracy": 0.01, "fgsm_accuracy": 0.1, "held_clean_accuracy": 0.4}, {}),
    ("at the threshold", {"accuracy": CATASTROPHIC * 0.5 + 1e-6, "fgsm_accuracy": 0.5}, {}),
    ("the radius still grows", {"accuracy": 0.05, "fgsm_accuracy": 0.5}, {"warmup_epochs": 10}),
]


@pytest.mark.parametrize(("values", "settings"), [row[1:] for row in SILENT], ids=[row[0] for row in SILENT])
def test_networks_that_did_not_collapse_raise_no_alarm(
    values: dict[str, float], settings: dict[str, Any], measured: dict[str, float], attacks: list[Any]
) -> None:
    measured.update(values)
    zoo.trainer(max_epochs=2, callbacks=[switching(**settings)]).fit(zoo.built(Net), zoo.loader(Net))
    assert {type(attack).__name__ for attack in attacks} == {"FGSM"}


# -- on real digits --------------------------------------------------------------------------------------------------

HARD = ThreatModel("linf", 0.3)


class Digits8(zoo.ListBatch):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32 * 16, 10)),
        )

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=5e-3)


def digits(n: int, batch_size: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """The first n of the mixed 8x8 digits to train, the last 397 to test."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16)[order]
    y = torch.tensor(found.target, dtype=torch.long)[order]
    train = DataLoader(TensorDataset(x[:n], y[:n]), batch_size, shuffle=True)
    return train, DataLoader(TensorDataset(x[1400:], y[1400:]), 397)


def run(seed: int, epochs: int, n: int, batch_size: int, method: str = "fgsm", **settings: Any) -> Any:
    """The epochs of one run, the warnings, and accuracy of the test digits under PGD-20."""
    train, test = digits(n, batch_size)
    module, seen = zoo.built(Digits8, seed), Epochs()
    attack = PGD(HARD, steps=7) if method == "madry" else HARD
    callbacks = [AdversarialTraining(attack, method, **settings), seen]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        zoo.trainer(max_epochs=epochs, callbacks=callbacks).fit(module, train)
    evaluation = zoo.trainer(callbacks=[RobustAccuracy(PGD(HARD, steps=20))])
    evaluation.validate(module, test, verbose=False)
    alarms = [str(entry.message) for entry in told if "catastrophic" in str(entry.message)]
    return seen, alarms, float(evaluation.callback_metrics["robust/val/accuracy"])


def test_fgsm_training_of_digits_collapses_and_pgd_brings_it_back() -> None:
    seen, alarms, _ = run(0, 13, 700, 64, overfitting="switch")
    rows = seen.logged
    (said,) = alarms
    epoch = int(said.split("in epoch ")[1].split(":")[0])
    assert rows[epoch]["robust/train/pgd_to_fgsm"] < CATASTROPHIC
    assert rows[epoch]["robust/train/accuracy"] < 0.15
    assert rows[-1]["robust/train/accuracy"] > 0.3  # after 14 epochs of seeds 0 to 2: 0.41, 0.41 and 0.38
    assert rows[-1]["robust/train/pgd_to_fgsm"] > 0.55  # 0.75, 0.87 and 0.73


def test_at_the_start_of_a_hard_training_there_is_no_alarm() -> None:
    """After one epoch 3 % are right under FGSM and none under PGD: nothing has been learnt that could collapse."""
    seen, alarms, _ = run(0, 3, 1400, 128, method="n-fgsm")
    assert seen.logged[0]["robust/train/fgsm_accuracy"] < 0.15
    assert alarms == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fgsm_collapses_where_pgd_does_not_with_every_seed(seed: int) -> None:
    fallen = run(seed, 30, 1400, 128)
    sound = run(seed, 30, 1400, 128, method="madry")
    back = run(seed, 30, 1400, 128, overfitting="switch")
    print("seed", seed, "PGD-20:", fallen[2], sound[2], back[2], "alarms", *map(len, (fallen[1], sound[1], back[1])))
    assert (len(fallen[1]), len(sound[1]), len(back[1])) == (1, 0, 1)
    assert fallen[2] < sound[2] - 0.1
    assert back[2] > fallen[2] + 0.1


# -- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "every"), [("madry", 18), ("n-fgsm", 96), ("trades", 16)])
def test_it_costs_about_a_twentieth_of_the_training_however_short_epochs_are(
    monkeypatch: pytest.MonkeyPatch, method: str, every: int
) -> None:
    monkeypatch.undo()
    alarm = AdversarialTraining(THREAT, method).alarm
    assert alarm.every == every
    for batches in (5, 31, 390):
        epochs = 2000 // batches
        trainer = SimpleNamespace(num_training_batches=batches, max_epochs=epochs, max_steps=-1)
        due = []
        for epoch in range(epochs):
            trainer.current_epoch = epoch
            due.append(alarm.due(trainer))
        assert due[-1]
        assert all(due) == (batches >= every)
        assert sum(due) <= epochs * batches / every + 1
        if batches < every:
            assert sum(due) >= epochs * batches // every  # never rarer than it may be


def test_where_the_end_or_the_length_is_not_known_every_epoch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    alarm = AdversarialTraining(THREAT, "n-fgsm").alarm
    stream = SimpleNamespace(num_training_batches=float("inf"), max_epochs=10, max_steps=-1, current_epoch=0)
    steps = SimpleNamespace(num_training_batches=5, max_epochs=-1, max_steps=7, current_epoch=0)
    assert alarm.due(stream)
    assert alarm.due(steps)
    assert not AdversarialTraining(THREAT, "n-fgsm", overfitting="ignore").alarm.due(stream)
