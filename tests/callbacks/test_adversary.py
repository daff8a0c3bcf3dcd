"""What is crafted for a batch: with which random numbers, for which samples, and where the batch allows it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch import Tensor
from torch.nn import functional as F
from trainer_runs import ATTACK, THREAT, Net

from lightning_robust import NFGSM, PGD, AdversarialTraining, RobustAccuracy, ThreatModel
from lightning_robust.attacks import JointThreat
from lightning_robust.callbacks.adversary import Adversary, threat_of

L2 = ThreatModel("l2", 0.8)


class Local(Net):
    """A batch that says where it may be changed (its left half, image by image) and how far."""

    @staticmethod
    def batch(n: int) -> Any:
        mask = torch.zeros(n, 8, 8)
        mask[:, :, :4] = 1
        mask[::2] = mask[::2].flip(2)
        return {"image": zoo.images(n), "label": zoo.labels(n), "mask": mask, "eps": 0.02 * (torch.arange(n) % 5)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch["image"]), batch["label"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=len(batch["label"]))


class Kept(pl.Callback):
    """What a batch was, and what became of it."""

    def __init__(self, of: AdversarialTraining) -> None:
        self.of, self.pairs = of, []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.pairs.append((batch, self.of._perturbed().clone()))


def crafted(shape: type[Any], attack: Any, *others: Any, **settings: Any) -> list[tuple[Any, Tensor]]:
    callback = AdversarialTraining(attack, **settings)
    kept = Kept(callback)
    zoo.trainer(callbacks=[*others, callback, kept]).fit(zoo.built(shape), zoo.loader(shape), zoo.loader(shape))
    return kept.pairs


CRAFTED: list[tuple[Any, dict[str, Any]]] = [
    (PGD(THREAT, steps=4), {}),
    (PGD(L2, steps=4), {}),
    (PGD(THREAT, steps=3, step_size=0.1, restarts=2), {"craft_mode": "train"}),
    (PGD(THREAT, steps=4), {"method": "trades"}),
    (PGD(L2, steps=4), {"method": "trades"}),
    (PGD(THREAT, steps=2), {"method": "mart"}),
    (PGD(THREAT, steps=2), {"share": 0.5}),
    (THREAT, {"method": "fgsm"}),
    (THREAT, {"method": "fgsm-rs"}),
    (THREAT, {"method": "n-fgsm"}),
]
NAMES = [f"{row[0]} {row[1]}" for row in CRAFTED]


@pytest.mark.parametrize(("attack", "settings"), CRAFTED, ids=NAMES)
def test_outside_of_the_mask_nothing_moves(attack: Any, settings: dict[str, Any]) -> None:
    for batch, found in crafted(Local, attack, mask_key="mask", **settings):
        delta, inside = found - batch["image"], batch["mask"].unsqueeze(1) != 0
        assert not delta[~inside].any()
        moved = delta.flatten(1).any(1)
        assert int(moved.sum()) == (8 if "share" in settings else 16)
        assert float(delta[inside].abs().max()) > 0.01


@pytest.mark.parametrize(("attack", "settings"), CRAFTED, ids=NAMES)
def test_each_sample_keeps_its_own_radius_and_reaches_it(attack: Any, settings: dict[str, Any]) -> None:
    threat = threat_of(attack) or attack
    far = 3.0 if settings.get("method") == "n-fgsm" else 1.0  # noise of 2 eps and a step of 1
    for batch, found in crafted(Local, attack, eps_key="eps", **settings):
        moved = threat.distance(found, batch["image"])
        assert bool((moved <= far * batch["eps"] * (1 + 1e-5) + 1e-6).all())
        assert not moved[batch["eps"] == 0].any()
        reached = (moved / batch["eps"])[(batch["eps"] > 0) & (moved > 0)]
        assert float(reached.median()) > 0.9


def test_mask_and_radius_together_and_while_the_radius_grows() -> None:
    settings = {"mask_key": "mask", "eps_key": "eps", "warmup_epochs": 2}
    for number, (batch, found) in enumerate(crafted(Local, PGD(THREAT, steps=4), **settings)):
        delta = found - batch["image"]
        assert not delta[batch["mask"].unsqueeze(1) == 0].any()
        assert bool((delta.flatten(1).abs().amax(1) <= (number + 1) / 4 * batch["eps"] + 1e-6).all())


@pytest.mark.parametrize("shape", [(16, 1, 8, 8), (1, 1, 8, 8), (16, 8, 8), (1, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_a_mask_may_have_channels_or_not_and_be_of_any_type(shape: Any, dtype: torch.dtype) -> None:
    mask = torch.zeros(shape)
    mask[..., :3, :] = 1

    class Masked(Local):
        @staticmethod
        def batch(n: int) -> Any:
            return {"image": zoo.images(n), "label": zoo.labels(n), "mask": mask.to(dtype)}

    batch, found = crafted(Masked, ATTACK, mask_key="mask")[0]
    delta = found - batch["image"]
    assert not delta[:, :, 3:].any()
    assert delta[:, :, :3].any()


WRONG: list[tuple[str, Tensor, str]] = [
    ("mask", torch.ones(16), r"mask_key= must lead to a mask for inputs \(16, 1, 8, 8\).*got \(16,\)"),
    ("mask", torch.ones(16, 1, 4, 8), r"mask_key= must lead to a mask.*got \(16, 1, 4, 8\)"),
    ("mask", torch.ones(3, 8, 8), r"mask_key= must lead to a mask.*got \(3, 1, 8, 8\)"),
    ("eps", torch.ones(16, 1), r"eps_key= must lead to a radius for each of 16 samples, got \(16, 1\)"),
    ("eps", torch.tensor(0.1), r"eps_key= must lead to a radius for each of 16 samples, got \(\)"),
    ("eps", torch.full((16,), -0.1), "within.eps=. takes radii >= 0"),
    ("eps", torch.full((16,), float("nan")), "within.eps=. takes radii >= 0"),
]


@pytest.mark.parametrize(("key", "value", "says"), WRONG, ids=[f"{row[0]} {tuple(row[1].shape)}" for row in WRONG])
def test_a_mask_or_radius_that_does_not_fit_is_said_before_the_first_step(key: str, value: Tensor, says: str) -> None:
    class Odd(Local):
        @staticmethod
        def batch(n: int) -> Any:
            return {**Local.batch(n), key: value}

    named: dict[str, Any] = {f"{key}_key": key}
    trainer = zoo.trainer(callbacks=[AdversarialTraining(ATTACK, **named)])
    with pytest.raises(ValueError, match=says):
        trainer.fit(zoo.built(Odd), zoo.loader(Odd))
    assert trainer.global_step == 0


def test_a_key_that_leads_nowhere_is_said_with_what_there_is() -> None:
    with pytest.raises(KeyError, match=r"nothing at batch\['masks'\].*batch\['mask'\]"):
        crafted(Local, ATTACK, mask_key="masks")


def test_masks_are_about_one_input() -> None:
    attack = PGD(JointThreat((THREAT, THREAT)), steps=1)

    class Two(Local):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch["image"] * batch["other"]), batch["label"])

        @staticmethod
        def batch(n: int) -> Any:
            return {**Local.batch(n), "other": zoo.images(n, 1)}

    with pytest.raises(ValueError, match="mask_key= and eps_key= are about one input; here are several"):
        crafted(Two, attack, input_key=["image", "other"], mask_key="mask")


@pytest.mark.parametrize("others", [[], [RobustAccuracy(ATTACK)]], ids=["alone", "beside one that has no mask"])
def test_who_has_a_mask_has_it_beside_others_too(others: list[Any]) -> None:
    batch, found = crafted(Local, ATTACK, *others, mask_key="mask")[0]
    assert not (found - batch["image"])[batch["mask"].unsqueeze(1) == 0].any()


def test_who_has_no_mask_has_none_beside_one_that_has() -> None:
    others = [RobustAccuracy(ATTACK, mask_key="mask")]
    batch, found = crafted(Local, ATTACK, *others)[0]
    assert (found - batch["image"])[batch["mask"].unsqueeze(1) == 0].any()


# -- settings of one moment ------------------------------------------------------------------------------------------


def adversary(**settings: Any) -> Adversary:
    usual = {"method": "madry", "share": 1.0, "warmup_epochs": 0.0, "start_epoch": 0, "craft_mode": "eval", "seed": 0}
    return Adversary(**{**usual, **settings})


def at(epoch: int, batches: float = 4, step: int = 0) -> Any:
    return SimpleNamespace(current_epoch=epoch, num_training_batches=batches, global_rank=0, global_step=step)


def test_random_numbers_are_a_function_of_seed_rank_step_and_batch() -> None:
    one = adversary(seed=3)
    one.begin(at(0, step=7))
    one.next_batch(2)
    assert one.keys() == (3, 0, 7, 2)


def test_what_was_crafted_belongs_to_one_batch_of_one_fit() -> None:
    one = adversary()
    one.begin(at(0))
    for leave in (lambda: one.next_batch(1), lambda: one.begin(at(0)), one.forget):
        one.crafted = torch.zeros(1)
        leave()
        assert one.crafted is None
    assert one.trainer is None


def test_it_is_active_from_its_first_epoch_on() -> None:
    one = adversary(start_epoch=2)
    active = []
    for epoch in range(4):
        one.begin(at(epoch))
        active.append(one.active)
    assert active == [False, False, True, True]


class Whole:
    """A reading that sets nothing: what is left is the moment's own."""

    def fitted(self, attack: Any, change: Any) -> Any:
        from dataclasses import replace

        return replace(attack, threat=change(attack.threat))


def test_radius_and_step_size_grow_together_and_trades_brings_start_and_objective() -> None:
    one = adversary(warmup_epochs=2.0, start_epoch=1)
    one.begin(at(1))
    one.next_batch(1)  # a quarter of the way: half an epoch of two
    fitted = one.fitted(PGD(THREAT, steps=5, step_size=0.08), Whole())  # type: ignore[arg-type]  # a stand-in
    assert (fitted.threat.eps, fitted.step_size) == pytest.approx((0.025, 0.02))
    assert fitted.threat.pixels.outside == "widen"
    assert one.fitted(NFGSM(THREAT), Whole()).threat.eps == pytest.approx(0.025)  # type: ignore[arg-type]
    trades = adversary(method="trades")
    trades.begin(at(0))
    fitted = trades.fitted(PGD(THREAT), Whole())  # type: ignore[arg-type]
    assert (fitted.start, fitted.objective, fitted.threat.eps) == ("gaussian", "kl", 0.1)


def test_a_threat_is_one_of_ours_or_none() -> None:
    assert threat_of(PGD(THREAT)) is THREAT
    assert threat_of(SimpleNamespace(threat="linf")) is None
    assert threat_of(lambda f, x, y: x) is None
