"""Which samples are watched: the hardest, the surest mistakes, listed ones, other data; chosen once and for all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import PGD, SaliencySnapshots, ThreatModel
from lightning_robust.callbacks.probe_sets import joined, score_of


def data(n: int = 60, seed: int = 1) -> DataLoader[Any]:
    return DataLoader(TensorDataset(zoo.images(n, seed), zoo.labels(n)), 16)


class Net(zoo.ListBatch):
    """No dropout, whose draws a resumed run does not repeat."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 10)]
        self.net = nn.Sequential(*layers)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.2)


class Weights(pl.Callback):
    """Of each validation."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})


def fit(*callbacks: Any, validation: Any = None, path: Any = None, **settings: Any) -> tuple[Any, pl.Trainer]:
    module = zoo.built(Net)
    trainer = zoo.trainer(**{"max_epochs": 2, "callbacks": list(callbacks), **settings})
    trainer.fit(module, data(64, 0), validation or data(), ckpt_path=path)
    return module, trainer


def log_p(state: dict[str, Tensor]) -> Tensor:
    module = zoo.built(Net)
    module.load_state_dict(state)
    with torch.no_grad():
        logits: Tensor = module.eval()(data().dataset.tensors[0])
    return logits.log_softmax(1)


def test_the_hardest_and_the_surest_mistakes_are_those_of_the_first_validation() -> None:
    weights = Weights()
    callback = SaliencySnapshots(["gradient"], samples=5, probes=["hardest", "confident_wrong"])
    _, trainer = fit(callback, weights)
    sets, labels, first = callback.sets.of("val"), data().dataset.tensors[1], log_p(weights.states[0])
    loss = torch.nn.functional.nll_loss(first, labels, reduction="none")
    assert sets["hardest"].probes.index.tolist() == loss.argsort(descending=True)[:5].tolist()
    sure, seen = first.max(1)
    wrong = [i for i in sure.argsort(descending=True).tolist() if seen[i] != labels[i]][:5]
    assert sets["confident_wrong"].probes.index.tolist() == wrong
    keys = {key.split("/")[1] for key in trainer.callback_metrics if key.startswith("saliency")}
    assert keys == {"val_hardest", "val_hardest_gradient", "val_confident_wrong", "val_confident_wrong_gradient"}


def test_what_was_hardest_stays_in_the_set_when_a_run_is_resumed(tmp_path: Path) -> None:
    def callback() -> SaliencySnapshots:
        return SaliencySnapshots(["gradient"], samples=4, probes=["stratified", "hardest"])

    whole = callback()
    keeping = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(whole, keeping, max_epochs=4, enable_checkpointing=True)
    resumed, weights = callback(), Weights()
    again = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(resumed, weights, again, max_epochs=4, path=tmp_path / "epoch=1.ckpt", enable_checkpointing=True)
    for name in ("", "hardest"):
        before, after = (c.sets.of("val")[name] for c in (whole, resumed))
        assert before.probes.hash == after.probes.hash
        assert before.history == after.history
    labels = data().dataset.tensors[1]
    now = torch.nn.functional.nll_loss(log_p(weights.states[0]), labels, reduction="none").argsort(descending=True)
    assert resumed.sets.of("val")["hardest"].probes.index.tolist() != now[:4].tolist()  # else this shows nothing


def test_probes_can_be_listed() -> None:
    callback = SaliencySnapshots(["gradient"], indices=[31, 2, 44])
    fit(callback)
    probes = callback.sets.first("val").probes
    x, y = data().dataset.tensors
    assert probes.index.tolist() == [31, 2, 44]
    assert torch.equal(probes.x, x[[31, 2, 44]])
    assert torch.equal(probes.label, y[[31, 2, 44]])


@pytest.mark.parametrize("source", ["data set", "loader", "bare inputs"])
def test_other_data_are_explained_for_what_they_were_taken_for_at_first(source: str) -> None:
    x, y = zoo.images(20, 7), zoo.labels(20)
    extra: Any = {
        "data set": TensorDataset(x, y),
        "loader": DataLoader(TensorDataset(x, y), 6),
        "bare inputs": [x[:10], x[10:]],
    }[source]
    weights, callback = Weights(), SaliencySnapshots(["gradient"], samples=8, extra={"other": extra})
    module, trainer = fit(callback, weights)
    probes = callback.sets.of("val")["other"].probes
    assert len(probes) == 8
    if source != "data set":  # of which a seeded choice is taken
        assert torch.equal(probes.x, x[:8])
    module.load_state_dict(weights.states[0])
    with torch.no_grad():
        assert torch.equal(probes.label, module.eval()(probes.x).argmax(1))
    assert "saliency/val_other_gradient/iou10_to_anchor" in trainer.callback_metrics
    assert trainer.callback_metrics["saliency/val_other/flips"] >= 0


def test_other_data_keep_their_labels_when_a_run_is_resumed(tmp_path: Path) -> None:
    def callback() -> SaliencySnapshots:
        return SaliencySnapshots(["gradient"], samples=4, extra={"other": TensorDataset(zoo.images(9, 7))})

    whole, resumed = callback(), callback()
    keeping = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(whole, keeping, max_epochs=4, enable_checkpointing=True)
    again = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(resumed, again, max_epochs=4, path=tmp_path / "epoch=1.ckpt", enable_checkpointing=True)
    before, after = (c.sets.of("val")["other"] for c in (whole, resumed))
    assert before.probes.hash == after.probes.hash
    assert before.history == after.history


def test_an_empty_set_is_an_error_in_the_first_validation_of_strict_runs() -> None:
    with pytest.raises(ValueError, match="probe set 'other' is empty"):
        fit(SaliencySnapshots(["gradient"], extra={"other": []}, strict=True))


def test_the_attacked_set_is_the_first_one_under_attack_and_says_where_the_attack_goes() -> None:
    attack = PGD(ThreatModel("linf", 0.1), steps=3)
    callback = SaliencySnapshots(["gradient"], samples=5, attack=attack)
    module, trainer = fit(callback)
    first, attacked = callback.sets.first("val"), callback.sets.of("val")["attacked"]
    assert attacked.probes.hash == first.probes.hash
    x, y = first.probes.x, first.probes.label
    from lightning_robust.randomness import seeded

    noise = [seeded(0, i) for i in first.probes.index.tolist()]
    module.eval()
    moved = attack(module, x, y, generator=noise).requires_grad_()
    (gradient,) = torch.autograd.grad(module(moved).gather(1, y[:, None]).sum(), moved)
    found = attacked.films["gradient"].shown()[-1][1]
    expected = gradient.abs().sum(1)
    assert float((found - expected).abs().max()) <= float(expected.max()) / 127
    metrics = trainer.callback_metrics
    assert 0 <= metrics["saliency/val_attacked_gradient/attack_iou10"] <= 1
    assert metrics["saliency/val_attacked/flips"] >= 0


def test_masks_of_the_batch_tell_how_much_of_a_map_lies_inside() -> None:
    x, y = data().dataset.tensors
    masks = torch.zeros(len(x), 1, 8, 8)
    masks[:, :, :2] = 1
    loader = DataLoader(TensorDataset(x, y, masks), 16)
    callback, weights = SaliencySnapshots(["gradient"], samples=6, region_key=2), Weights()

    class Three(Net):
        def shared(self, batch: Any) -> Tensor:
            x, y, _ = batch
            return torch.nn.functional.cross_entropy(self(x), y)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.shared(batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.shared(batch))

    module = zoo.built(Three)
    trainer = zoo.trainer(callbacks=[callback, weights])
    trainer.fit(module, loader, loader)
    probes = callback.sets.first("val").probes
    module.load_state_dict(weights.states[-1])
    leaf = probes.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(module.eval()(leaf).gather(1, probes.label[:, None]).sum(), leaf)
    maps = gradient.abs()[:, 0]
    expected = (maps[:, :2].sum((1, 2)) / maps.sum((1, 2))).mean()
    found = trainer.callback_metrics["saliency/val_gradient/mass_in_region"]
    assert float(found) == pytest.approx(float(expected), abs=1e-5)


def test_ranks_are_the_loss_and_the_confidence_of_mistakes() -> None:
    p = torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1]])
    labels = torch.tensor([0, 0, 1])
    assert torch.allclose(score_of("hardest", p.log(), labels), -torch.tensor([0.7, 0.4, 0.1]).log())
    wrong = score_of("confident_wrong", p.log(), labels)
    assert torch.allclose(wrong, torch.tensor([0.0, 0.6, 0.9]).log())
    assert score_of("stratified", p.log(), labels) is None
    assert (joined("val", ""), joined("val_hardest", "gradcam")) == ("val", "val_hardest_gradcam")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"probes": "hardest"}, "a list of 'stratified', 'hardest', 'confident_wrong', got 'hardest'"),
        ({"probes": ["easiest"]}, r"got \['easiest'\]"),
        ({"probes": []}, r"got \[\]"),
        ({"indices": []}, r"from 0 on; got \[\]"),
        ({"indices": [-1, 3]}, r"from 0 on; got \[-1, 3\]"),
        ({"extra": {"hardest": []}}, "cannot be called 'hardest'.*attacked, confident_wrong, hardest"),
        ({"extra": {"a/b": []}}, "cannot be called 'a/b'"),
    ],
)
def test_what_cannot_be_chosen_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SaliencySnapshots(["gradient"], **settings)


def test_numbers_that_the_data_do_not_hold_are_said() -> None:
    with pytest.warns(UserWarning, match=r"val data hold no sample .* of the numbers \[1000\] that indices= asks"):
        _, trainer = fit(SaliencySnapshots(["gradient"], indices=[3, 1000]))
    assert "saliency/val_gradient/gini" in trainer.callback_metrics


class Right(Net):
    """Is right about everything: the first pixel says what it is."""

    def forward(self, x: Tensor) -> Tensor:
        names: Tensor = (10 * x[:, 0, 0, 0]).unsqueeze(1) - torch.arange(10)
        return 0.01 * self.net(x) - names.square()


def test_a_set_that_nothing_fits_leaves_the_others_alone() -> None:
    x, y = data().dataset.tensors
    x = x.clone()
    x[:, 0, 0, 0] = y / 10
    loader = DataLoader(TensorDataset(x, y), 16)
    callback = SaliencySnapshots(["gradient"], samples=4, probes=["confident_wrong", "stratified"])
    zoo.trainer(callbacks=[callback]).fit(zoo.built(Right), loader, loader)
    assert callback.sets.of("val")["confident_wrong"].probes is None
    assert len(callback.sets.of("val")[""].history) == 1


def test_two_processes_choose_what_one_chooses(tmp_path: Path) -> None:
    script, result = Path(__file__).parent / "two_processes_saliency.py", tmp_path / "result.json"
    subprocess.run([sys.executable, script, "sets", result], check=True, timeout=240, capture_output=True)
    found = json.loads(result.read_text())
    assert found["2"]["indices"] == found["1"]["indices"]
    assert found["2"]["metrics"] == pytest.approx(found["1"]["metrics"], abs=1e-5)
    assert any("hardest" in key for key in found["1"]["metrics"])
