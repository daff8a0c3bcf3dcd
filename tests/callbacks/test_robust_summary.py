"""What RobustAccuracy says beside accuracies: a curve, classes and groups, intervals, other metrics, masking."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassCalibrationError, MulticlassF1Score

from lightning_robust import PGD, RobustAccuracy, ThreatModel, read_entry
from lightning_robust.intervals import wilson
from lightning_robust.randomness import seeded

N = 120
SITES = ["north", "south", "east"]


class Linear(pl.LightningModule):
    """Two classes by the mean of four pixels: every number below can be computed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2, bias=False)
        with torch.no_grad():
            self.net.weight.copy_(torch.tensor([[-1.0] * 4, [1.0] * 4]))
            self.net.weight.mul_(5)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch["x"] - 0.5), batch["y"])

    test_step = validation_step


def samples() -> list[dict[str, Any]]:
    """Sample i is ``radius_i`` away from the boundary; one in ten is on the wrong side of it."""
    rows = []
    for i in range(N):
        radius = 0.001 + 0.2 * (i % 24) / 24
        label = i % 2
        side = (1 if label else -1) * (-1 if i % 10 == 9 else 1)
        rows.append({"x": torch.full((4,), 0.5 + side * radius), "y": label, "site": SITES[i % 3], "code": i % 3})
    return rows


def radii() -> Tensor:
    """The smallest perturbation (linf) that fools each sample; 0 where it is wrong."""
    return torch.tensor([0.0 if i % 10 == 9 else 0.001 + 0.2 * (i % 24) / 24 for i in range(N)])


def validated(callback: RobustAccuracy, batch_size: int = 50, stage: str = "validate") -> dict[str, float]:
    trainer = zoo.trainer(callbacks=[callback])
    getattr(trainer, stage)(Linear(), DataLoader(samples(), batch_size), verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


ATTACK = PGD(ThreatModel("linf", 0.1), steps=5)


def test_the_curve_is_the_share_of_samples_that_are_farther_away_than_each_radius() -> None:
    curve = [0.15, 0.02, 0.08]
    found = validated(RobustAccuracy(ATTACK, curve=curve, examples=0))
    for radius in curve:
        expected = float((radii() > radius).float().mean())
        assert found[f"robust/val/curve/{radius}"] == pytest.approx(expected, abs=1e-6)
    assert found["robust/val/accuracy"] == pytest.approx(float((radii() > 0.1).float().mean()), abs=1e-6)


def test_the_mean_radius_is_that_of_the_smallest_perturbations_found() -> None:
    """On a fine grid every sample falls to the first radius that reaches it."""
    grid = [0.005 * k for k in range(1, 45)]
    found = validated(RobustAccuracy(ATTACK, curve=grid, examples=0))
    assert found["robust/val/mean_radius"] == pytest.approx(float(radii().mean()), abs=0.005)


def test_only_samples_that_hold_are_attacked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = nn.Linear.forward

    def counting(self: nn.Linear, x: Tensor) -> Tensor:
        if x.requires_grad:
            seen.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counting)
    validated(RobustAccuracy(ATTACK, examples=0), batch_size=N)
    right, holds = int((radii() > 0).sum()), int((radii() > 0.1).sum())
    assert seen[1] == right  # the first one finds the way to the logits, on the whole batch
    assert seen[-1] <= right
    assert sum(seen[1:]) < 5 * right
    assert min(seen[1:]) >= holds


def test_groups_and_classes_have_accuracies_of_their_own() -> None:
    for key, names in (("site", SITES), ("code", ["0", "1", "2"])):
        callback = RobustAccuracy(ATTACK, group_key=key, examples=0)
        found = validated(callback)
        holds, index = radii() > 0.1, torch.arange(N)
        by_group = {}
        for g, name in enumerate(names):
            by_group[name] = float(holds[index % 3 == g].float().mean())
            assert found[f"robust/val/group/{name}/accuracy"] == pytest.approx(by_group[name])
            clean = float((radii() > 0)[index % 3 == g].float().mean())
            assert found[f"robust/val/group/{name}/clean_accuracy"] == pytest.approx(clean)
        assert found["robust/val/worst_group_accuracy"] == pytest.approx(min(by_group.values()))
        by_class = [float(holds[index % 2 == c].float().mean()) for c in (0, 1)]
        assert found["robust/val/worst_class_accuracy"] == pytest.approx(min(by_class))
        assert callback._entry["groups"].keys() == set(names)
        assert callback._entry["classes"]["1"] == pytest.approx(
            [60, float((radii() > 0)[1::2].float().mean()), by_class[1]]
        )


def test_the_interval_is_wilsons_with_the_number_of_samples() -> None:
    found = validated(RobustAccuracy(ATTACK, max_samples=100, examples=0))
    low, high = wilson(float((radii()[:100] > 0.1).float().mean()), 100)
    assert (found["robust/val/interval_low"], found["robust/val/interval_high"]) == pytest.approx((low, high))
    assert found["robust/val/samples"] == 100


def test_other_metrics_are_those_of_torchmetrics_on_the_attacked_inputs() -> None:
    f1 = MulticlassF1Score(2, average="macro")
    callback = RobustAccuracy(
        PGD(ThreatModel("linf", 0.1), steps=5, keep="last"), metrics={"f1": f1}, calibration=True, examples=0
    )
    found = validated(callback, batch_size=N)
    batch = next(iter(DataLoader(samples(), N)))
    module, x, y = Linear(), batch["x"], batch["y"]
    noise = [seeded(0, i) for i in range(N)]
    attacked = PGD(ThreatModel("linf", 0.1), steps=5)(lambda z: module.net(z - 0.5), x, y, generator=noise)
    for condition, inputs in (("clean", x), ("pgd5_linf_0.1", attacked)):
        logits = module.net(inputs - 0.5).detach()
        assert found[f"robust/val/f1_{condition}"] == pytest.approx(float(f1(logits, y)), abs=1e-6)
        confidence = float(logits.softmax(1).amax(1).mean())
        assert found[f"robust/val/confidence_{condition}"] == pytest.approx(confidence, abs=1e-5)
        theirs = MulticlassCalibrationError(2, n_bins=15)(logits, y)
        assert found[f"robust/val/ece_{condition}"] == pytest.approx(float(theirs), abs=1e-5)
    assert f1.update_count == 2  # ours are copies


def test_masking_is_diagnosed_in_the_test_and_warned_of() -> None:
    class Saturated(Linear):
        def test_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(1000 * self.net(batch["x"] - 0.5), batch["y"])

    for kind, loud in ((Linear, False), (Saturated, True)):
        trainer = zoo.trainer(
            callbacks=[RobustAccuracy(PGD(ThreatModel("linf", 0.05), steps=5), masking=True, examples=0)]
        )

        def run(module: Any = kind, trainer: Any = trainer) -> None:
            trainer.test(module(), DataLoader(samples(), 60), verbose=False)

        if loud:
            with pytest.warns(UserWarning, match=r"may be an artefact \(gradient masking\).*exactly zero"):
                run()
        else:
            run()
        metrics = trainer.callback_metrics
        assert (float(metrics["robust/test/masking_suspicions"]) > 0) == loud
        assert (float(metrics["robust/test/masking/zero_gradients"]) > 0.5) == loud


def test_what_is_measured_goes_into_the_checkpoint(tmp_path: Any) -> None:
    class Trained(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.net(batch["x"] - 0.5), batch["y"])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    callback = RobustAccuracy(ATTACK, curve=[0.05, 0.1], group_key="site", examples=0)
    keep = pl.callbacks.ModelCheckpoint(tmp_path, filename="x")
    trainer = zoo.trainer(enable_checkpointing=True, callbacks=[keep, callback])
    trainer.fit(Trained(), DataLoader(samples(), N), DataLoader(samples(), 50))
    entry = read_entry(keep.best_model_path)["robust"]
    shares = [float((radii() > radius).float().mean()) for radius in (0.05, 0.1)]
    assert entry["curve"] == {"radii": [0.05, 0.1], "accuracy": pytest.approx(shares)}
    assert entry["groups"]["north"][0] == 40


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"curve": [0.0, 0.1]}, r"curve= takes radii above 0 in pixel units, got \[0.0, 0.1\]"),
        ({"attacks": lambda logits_fn, x, y: x, "curve": [0.1]}, "must have a ThreatModel as its `threat`"),
    ],
)
def test_curves_that_cannot_be_drawn_are_refused_at_once(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RobustAccuracy(**{"attacks": ATTACK, **settings})


def test_a_group_key_that_leads_to_no_groups_is_an_error_before_anything_is_lost() -> None:
    with pytest.raises(
        ValueError, match=r"group_key= must lead to a whole number or a string for each of 50 samples, got torch.float"
    ):
        validated(RobustAccuracy(ATTACK, group_key="x", examples=0))
