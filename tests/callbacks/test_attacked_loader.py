"""What RobustAccuracy makes of curves, heads, regions, groups and loaders that strangers give it."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset
from torchmetrics.classification import BinaryAccuracy, MulticlassF1Score

from lightning_robust import PGD, AdversarialTraining, PixelSpace, RobustAccuracy, ThreatModel, WorstCase
from lightning_robust.attacks import APGD, FGSM, Square, UniformNoise
from lightning_robust.randomness import seeded

LINF, L2 = ThreatModel("linf", 0.1), ThreatModel("l2", 0.5)
X = torch.rand(60, 8, generator=seeded(0))
SHADES = torch.rand(60, 1, 8, 8, generator=seeded(1))


class Linear(pl.LightningModule):
    """One linear layer; ``outputs`` and the loss make the head."""

    outputs = 3

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, self.outputs)
        with torch.no_grad():
            self.net.weight.copy_(torch.randn(self.outputs, 8, generator=seeded(2)))
            self.net.bias.copy_(-0.5 * self.net.weight.sum(1))

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.training_step(batch, batch_idx)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Labels(Linear):
    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, y)


class Single(Linear):
    outputs = 1

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits.reshape(y.shape), y)


def loader(y: Tensor, *more: Tensor, batch_size: int = 20, x: Tensor = X, **settings: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y, *more), batch_size, **settings)


def classes() -> Tensor:
    """Right for most of the samples."""
    y: Tensor = Linear().net(X).argmax(1)
    y[::7] = (y[::7] + 1) % 3
    return y


def yes(shape: tuple[int, ...] = (60,)) -> Tensor:
    return (Single().net(X).detach().reshape(shape) > 0).float()


def validated(callback: Any, module: Any, data: Any) -> dict[str, float]:
    trainer = zoo.trainer(callbacks=[callback])
    trainer.validate(module, data, verbose=False)
    return {key.removeprefix("robust/val/"): float(value) for key, value in trainer.callback_metrics.items()}


def test_a_curve_is_about_one_norm_whatever_other_attacks_there_are() -> None:
    curve = [0.1, 0.3, 0.5]
    alone = validated(RobustAccuracy({"l2": PGD(L2, steps=5)}, curve=curve), Linear(), loader(classes()))
    both = {"l2": PGD(L2, steps=5), "linf": PGD(LINF, steps=5)}
    beside = validated(RobustAccuracy(both, curve=curve), Linear(), loader(classes()))
    for key in ("mean_radius", *(f"curve/{radius}" for radius in curve)):
        assert beside[key] == alone[key]
    assert beside["curve/0.5"] == beside["accuracy_l2"] > 0


def test_a_curve_of_samples_with_several_predictions_is_refused() -> None:
    y = (torch.rand(60, 3, generator=seeded(3)) > 0.5).float()
    with pytest.raises(ValueError, match="each has 3 predictions"):
        validated(RobustAccuracy(PGD(LINF, steps=1), curve=[0.1]), Labels(), loader(y))


def test_one_yes_no_output_is_one_prediction_in_both_of_its_shapes() -> None:
    callbacks = [RobustAccuracy(PGD(LINF, steps=5), curve=[0.05]) for _ in range(2)]
    flat, column = (
        validated(callback, Single(), loader(yes(shape)))
        for callback, shape in zip(callbacks, [(60,), (60, 1)], strict=True)
    )
    assert flat == column
    assert {"worst_class_accuracy", "curve/0.05"} <= set(flat)
    assert 0 < flat["accuracy"] < flat["clean_accuracy"]


@pytest.mark.parametrize(
    "attack",
    [
        APGD(LINF, steps=20),
        APGD(LINF, steps=20, targets=1),
        Square(LINF, queries=300),
        WorstCase([PGD(LINF, steps=1, step_size=0.1, start="zero"), PGD(LINF, steps=10)]),
    ],
    ids=lambda a: a.name,
)
def test_with_several_labels_an_attack_goes_on_until_all_are_wrong(attack: Any) -> None:
    """Labels by features of their own: the best attack on each is known, and moves all of them at once."""

    class Apart(Labels):
        def __init__(self) -> None:
            super().__init__()
            self.net.weight.data.zero_()
            self.net.weight.data[torch.arange(3), torch.arange(3)] = 4.0
            self.net.bias.data.fill_(-2.0)

    y = (X[:, :3] > 0.5).float()
    expected = float(((X[:, :3] - 0.5).abs() > 0.1).float().mean())
    for module, settings in ((Apart(), {}), (Apart(), {"calibration": True})):
        found = validated(RobustAccuracy(attack, **settings), module, loader(y))
        assert found["accuracy"] == pytest.approx(expected, abs=1e-6)
    assert found["clean_accuracy"] == 1


@pytest.mark.parametrize("attack", [Square(LINF, queries=50), UniformNoise(LINF)], ids=lambda a: a.name)
def test_attacks_without_gradients_know_ignored_pixels(attack: Any) -> None:
    class Dense(zoo.Shape):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            F.cross_entropy(torch.cat([x - 0.5, 0.5 - x], 1) * 5, y, ignore_index=255)

    y = (SHADES[:, 0] <= 0.5).long()
    y[:, :4] = 255
    found = validated(RobustAccuracy(attack), Dense(), loader(y, x=SHADES))
    assert found["clean_accuracy"] == 1
    assert found["accuracy"] < 1


def test_regions_and_radii_are_for_attacks_that_know_them() -> None:
    mask = torch.ones(60, 8)

    def own(logits_fn: Any, x: Tensor, y: Tensor) -> Tensor:
        return x

    with pytest.raises(ValueError, match="mask_key= and eps_key= go to the `threat` of an attack"):
        validated(RobustAccuracy(own, mask_key=2), Linear(), loader(classes(), mask))
    with pytest.raises(ValueError, match="mask_key= and eps_key= go to the `threat` of an attack"):
        zoo.trainer(max_steps=1, callbacks=[AdversarialTraining(own, mask_key=2)]).fit(
            Linear(), loader(classes(), mask)
        )


def test_settings_that_contradict_each_other_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="curve= tries radii that are the same for all"):
        RobustAccuracy(PGD(LINF), curve=[0.1], eps_key=2)
    with pytest.raises(ValueError, match=r"masking= diagnoses in Trainer\.test"):
        RobustAccuracy(PGD(LINF), masking=True, stages=["val"])


def failing(logits_fn: Any, x: Tensor, y: Tensor) -> Tensor:
    raise RuntimeError("my attack is broken")


@pytest.mark.parametrize(
    ("arguments", "settings", "says"),
    [
        (PGD(LINF), {"group_key": "site"}, "site"),
        (PGD(LINF), {"mask_key": 5}, "5"),
        (PGD(LINF), {"metrics": {"f1": MulticlassF1Score(7)}}, "number of classes"),
        (PGD(LINF), {"metrics": {"f1": MulticlassF1Score(3, average=None)}}, r"one number each, but 'f1' computes"),
        (failing, {}, "my attack is broken"),
        (PGD(LINF, targeted="given"), {}, "it would help the model"),
        (WorstCase([FGSM(LINF), PGD(LINF, targeted="given")]), {}, "it would help the model"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*f1.*:UserWarning")
def test_what_is_wrong_with_settings_stops_the_run_in_the_sanity_check(
    arguments: Any, settings: dict[str, Any], says: str
) -> None:
    module, before = Linear(), []

    class Noting(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            before.append("trained")

    trainer = zoo.trainer(
        max_epochs=1, num_sanity_val_steps=1, callbacks=[Noting(), RobustAccuracy(arguments, **settings)]
    )
    with pytest.raises((ValueError, LookupError, RuntimeError, TypeError), match=says):
        trainer.fit(module, loader(classes()), loader(classes()))
    assert before == []


def test_a_loader_outside_the_pixel_bounds_is_left_out_and_the_first_is_measured() -> None:
    loaders = [loader(classes()), loader(classes(), x=X * 255)]
    with pytest.warns(UserWarning, match=r"loader 1 of val is left out.*got \[.*These look like 0..255"):
        found = validated(RobustAccuracy(PGD(LINF, steps=2)), Linear(), loaders)
    assert 0 < found["accuracy"] < 1
    assert not {key for key in found if key.endswith("/1")}


def test_a_loader_without_groups_is_measured_without_them() -> None:
    loaders = [loader(classes(), torch.arange(60) % 2), loader(classes())]
    with pytest.warns(UserWarning, match="loader 1 is measured without groups"):
        found = validated(RobustAccuracy(PGD(LINF, steps=2), group_key=2), Linear(), loaders)
    assert found["accuracy"] == found["accuracy/1"]
    assert {"group/0/accuracy", "group/1/accuracy", "worst_group_accuracy"} <= set(found)


def test_all_samples_may_be_asked_for() -> None:
    y = classes()
    found = validated(RobustAccuracy(PGD(LINF, steps=2), max_samples=10**12), Linear(), loader(y))
    assert found["samples"] == 60
    assert found == validated(RobustAccuracy(PGD(LINF, steps=2), max_samples=60), Linear(), loader(y))


@pytest.mark.parametrize("batch_size", [1, 60])
def test_a_metric_gets_probabilities_and_so_the_same_in_any_batch(batch_size: int) -> None:
    """Logits within [0, 1] would be taken for probabilities, batch by batch."""

    class Unsure(Single):
        def __init__(self) -> None:
            super().__init__()
            self.net.weight.data.mul_(0.1)
            self.net.bias.data.mul_(0.1)

    callback = RobustAccuracy(PGD(LINF, steps=2), metrics={"hits": BinaryAccuracy()})
    found = validated(callback, Unsure(), loader(yes(), batch_size=batch_size))
    assert found["hits_clean"] == found["clean_accuracy"] == 1
    assert found["hits_pgd2_linf_0.1"] == found["accuracy"]


def test_samples_that_change_from_epoch_to_epoch_are_noticed() -> None:
    callback = RobustAccuracy(PGD(LINF, steps=1), max_samples=20)
    trainer = zoo.trainer(max_epochs=2, callbacks=[callback])
    shuffled = loader(classes(), sampler=SubsetRandomSampler(range(60)))
    with (
        pytest.warns(UserWarning, match="evaluation loader 0 shuffles"),
        pytest.warns(UserWarning, match="the samples are others than in the last evaluation"),
    ):
        trainer.fit(Linear(), loader(classes()), shuffled)


def test_another_run_brings_other_data_which_are_looked_at_anew() -> None:
    callback = RobustAccuracy(PGD(LINF, steps=1))
    for x in (X, X.flip(0)):  # the same number of other samples: no warning, which would be an error here
        zoo.trainer(callbacks=[callback]).validate(Linear(), loader(classes(), x=x), verbose=False)
    with pytest.raises(ValueError, match=r"These look like 0\.\.255"):
        zoo.trainer(callbacks=[callback]).validate(Linear(), loader(classes(), x=X * 255), verbose=False)


def test_an_all_silent_model_is_right_nowhere() -> None:
    class Silent(Linear):
        def loss(self, logits: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(logits * torch.nan, y)

    with pytest.warns(UserWarning, match="NaN or infinite"):
        found = validated(RobustAccuracy(PGD(LINF, steps=1)), Silent(), loader(torch.zeros(60, dtype=torch.long)))
    assert (found["clean_accuracy"], found["accuracy"]) == (0, 0)


def test_masked_pixels_are_masked_in_the_diagnosis_as_well() -> None:
    """Seven of eight features must not change: that the model survives everything else is no sign of anything."""
    mask = torch.zeros(60, 8)
    mask[:, 0] = 1
    trainer = zoo.trainer(callbacks=[RobustAccuracy(PGD(LINF, steps=5), mask_key=2, masking=True)])
    trainer.test(Linear(), loader(Linear().net(X).argmax(1), mask, batch_size=60), verbose=False)
    logged = {key for key in trainer.callback_metrics if "masking/" in key}
    assert "robust/test/masking/zero_gradients" in logged
    assert not {"robust/test/masking/unbounded_survives", "robust/test/masking/flat_in_eps"} & logged
    assert float(trainer.callback_metrics["robust/test/masking_suspicions"]) == 0


# -- AdversarialTraining ---------------------------------------------------------------------------------------------


def test_what_cannot_be_attacked_stops_before_the_first_step_also_where_attacks_start_later() -> None:
    dark = ThreatModel("linf", 0.1, PixelSpace(bounds=(0, 0.5)))
    callback = AdversarialTraining(PGD(dark, steps=1), start_epoch=2)
    trainer = zoo.trainer(max_epochs=3, callbacks=[callback])
    with pytest.raises(ValueError, match="expected pixels within"):
        trainer.fit(Linear(), loader(classes()))
    assert trainer.global_step == 0


@pytest.mark.parametrize("method", ["madry", "trades", "mart"])
def test_a_class_that_is_switched_off_is_no_broken_model(method: str) -> None:
    class Masked(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            off = torch.tensor([0.0, 0.0, -torch.inf])
            return F.cross_entropy(self.net(batch[0]) + off, batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Masked()
    zoo.trainer(max_steps=2, callbacks=[AdversarialTraining(PGD(LINF, steps=2), method)]).fit(
        module, loader(classes() % 2)
    )
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())


def test_a_collapse_of_another_fit_is_forgotten() -> None:
    callback = AdversarialTraining(LINF, method="fgsm", overfitting="switch")
    callback.alarm.collapsed = True
    assert callback.alarm.remedy == PGD(LINF, steps=10)
    zoo.trainer(max_steps=1, callbacks=[callback]).fit(Linear(), loader(classes()))
    assert callback.alarm.remedy is None
