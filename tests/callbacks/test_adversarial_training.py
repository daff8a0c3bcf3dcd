"""Adversarial training: one step's parameter gradient against plain autograd, and everything around that step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust import NFGSM, PGD, AdversarialTraining, PixelSpace, ThreatModel
from lightning_robust.attacks import JointThreat
from lightning_robust.callbacks.adversary import Adversary
from lightning_robust.randomness import seeded

THREAT = ThreatModel("linf", 0.1)


class Asymmetric(zoo.ListBatch):
    """A BatchNorm net with lopsided logits, so that KL(p || q) and KL(q || p) differ; no dropout to match by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 10)
        )
        with torch.no_grad():
            self.net[-1].weight.mul_(4)
            self.net[-1].bias.copy_(torch.linspace(-2, 3, 10))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def one_step(
    callback: AdversarialTraining, shape: type[zoo.Shape] = Asymmetric, **settings: Any
) -> tuple[nn.Module, nn.Module]:
    """The module before and after one SGD step with learning rate 1: the difference is the gradient."""
    module = zoo.built(shape)
    before = copy.deepcopy(module)
    zoo.trainer(**{"max_steps": 1, "callbacks": [callback], **settings}).fit(module, zoo.loader(shape))
    return before, module


def assert_gradient(before: nn.Module, after: nn.Module, loss: Tensor, retain: bool = False) -> None:
    parameters = dict(before.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=retain)
    for (name, old), gradient in zip(parameters.items(), gradients, strict=True):
        torch.testing.assert_close(
            old - after.get_parameter(name), gradient, rtol=1e-4, atol=2e-6, msg=f"gradient of {name}"
        )


def pgd_by_hand(objective: Any, start: Tensor, clean: Tensor, steps: int, step_size: float) -> Tensor:
    x = start
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(x).sum(), x)
        x = x.detach() + step_size * gradient.sign()
        x = (clean + (x - clean).clamp(-THREAT.eps, THREAT.eps)).clamp(0, 1)
    return x


def test_madry_takes_the_gradient_at_the_attacked_input() -> None:
    before, after = one_step(AdversarialTraining(PGD(THREAT, steps=3, start="zero")))
    x, y = zoo.ListBatch.batch(16)
    net = before.net.eval()
    attacked = pgd_by_hand(lambda z: F.cross_entropy(net(z), y, reduction="none"), x, x, 3, 2.5 * 0.1 / 3)
    assert_gradient(before, after, F.cross_entropy(before.net.train()(attacked), y))
    assert int(after.net[1].num_batches_tracked) == 1


def test_trades_adds_beta_times_the_divergence_of_the_attacked_from_the_clean_prediction() -> None:
    beta, seed = 3.0, 5
    before, after = one_step(AdversarialTraining(PGD(THREAT, steps=4), "trades", beta=beta, seed=seed))
    x, y = zoo.ListBatch.batch(16)
    net = before.net.eval()
    with torch.no_grad():
        p = net(x).softmax(1)
    noise = torch.randn(x.shape, generator=seeded(seed, 0, 0, 0))
    start = (x + 0.001 * noise).clamp(0, 1)

    def divergence(z: Tensor) -> Tensor:
        return (p * (p.log() - net(z).log_softmax(1))).sum(1)

    attacked = pgd_by_hand(divergence, start, x, 4, 2.5 * 0.1 / 4)
    before.net.train()
    log_p = before.net(x).log_softmax(1)  # two forwards in train mode, each with statistics of its own
    log_q = before.net(attacked).log_softmax(1)
    kl = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    assert_gradient(before, after, F.nll_loss(log_p, y) + beta * kl, retain=True)
    reverse = (log_q.exp() * (log_q - log_p)).sum(1).mean()
    weights = before.net[-1].weight
    gradients = [torch.autograd.grad(term, weights, retain_graph=True)[0] for term in (kl, reverse)]
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) > 0.02  # the direction would show
    assert int(after.net[1].num_batches_tracked) == 2
    torch.testing.assert_close(after.net[1].running_mean, before.net[1].running_mean)


def test_n_fgsm_takes_one_unclipped_step_from_strong_noise() -> None:
    before, after = one_step(AdversarialTraining(THREAT, "n-fgsm", seed=3))
    x, y = zoo.ListBatch.batch(16)
    eta = (2 * torch.rand(x.shape, generator=seeded(3, 0, 0, 0)) - 1) * 2 * THREAT.eps
    noisy = (x + eta).clamp(0, 1).requires_grad_()
    net = before.net.eval()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(noisy), y, reduction="sum"), noisy)
    attacked = (noisy.detach() + THREAT.eps * gradient.sign()).clamp(0, 1)
    assert float((attacked - x).abs().max()) > THREAT.eps * 1.5
    assert_gradient(before, after, F.cross_entropy(before.net.train()(attacked), y))


def test_accumulated_gradients_are_the_sum_of_those_of_each_batch() -> None:
    callback = AdversarialTraining(PGD(THREAT, steps=2, start="zero"))
    before, after = one_step(callback, accumulate_grad_batches=2)
    x, y = zoo.ListBatch.batch(16)
    first = copy.deepcopy(before)
    loss = torch.zeros(())
    for _ in range(2):  # both batches hold the same samples; no weight has moved in between
        net = first.net.eval()
        attacked = pgd_by_hand(lambda z, net=net: F.cross_entropy(net(z), y, reduction="none"), x, x, 2, 2.5 * 0.1 / 2)
        first.net.train()
        loss = loss + F.cross_entropy(before.net.train()(attacked), y) / 2
        first.net(attacked)  # moves the running statistics that the second crafting sees
    assert_gradient(before, after, loss)


class WithLBFGS(Asymmetric):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


@pytest.mark.parametrize("method", ["madry", "trades"])
def test_lbfgs_meets_one_perturbation_in_all_its_closure_calls(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    crafted: list[Any] = []
    fitted = Adversary.fitted

    def counting(self: Adversary, attack: Any, reading: Any) -> Any:
        crafted.append(attack)
        return fitted(self, attack, reading)

    monkeypatch.setattr(Adversary, "fitted", counting)
    module, callback = zoo.built(WithLBFGS), AdversarialTraining(PGD(THREAT, steps=2), method)
    zoo.trainer(max_steps=2, callbacks=[callback]).fit(module, zoo.loader(WithLBFGS))
    assert len(crafted) == 2
    assert int(module.net[1].num_batches_tracked) > 4  # the closure ran several times


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    def weights(seed: int) -> Tensor:
        module = zoo.built(zoo.SideEffects)
        zoo.trainer(callbacks=[AdversarialTraining(PGD(THREAT, steps=2), seed=seed)]).fit(
            module, zoo.loader(zoo.SideEffects)
        )
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_warm_up_lets_the_radius_grow_in_every_step_and_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    radii: list[float] = []
    fitted = Adversary.fitted

    def watched(self: Adversary, *args: Any) -> Any:
        radii.append(fitted(self, *args).threat.eps)
        return fitted(self, *args)

    monkeypatch.setattr(Adversary, "fitted", watched)
    callback = AdversarialTraining(PGD(THREAT, steps=2, step_size=0.1), warmup_epochs=2)
    zoo.trainer(max_epochs=3, callbacks=[callback]).fit(zoo.built(zoo.ListBatch), zoo.loader(zoo.ListBatch))
    assert radii == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


class Data(pl.LightningDataModule):
    """Pixels from the loader; normalised on the device if asked to."""

    def __init__(self, on_device: bool) -> None:
        super().__init__()
        self.on_device = on_device

    def train_dataloader(self) -> Any:
        return zoo.loader(zoo.ListBatch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [(batch[0] - 0.3) / 0.2, batch[1]] if self.on_device else batch


class NormalisedByDataset(zoo.ListBatch):
    @staticmethod
    def batch(n: int) -> Any:
        return [(zoo.images(n) - 0.3) / 0.2, zoo.labels(n)]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_same_pixels_come_out_wherever_the_normalisation_stands(norm: Any) -> None:
    seen: dict[str, Tensor] = {}
    normalised = PixelSpace(mean=0.3, std=0.2)
    cases: list[tuple[str, type[zoo.Shape], Any, PixelSpace]] = [
        ("model", zoo.NormalisesInModel, zoo.loader(zoo.NormalisesInModel), PixelSpace()),
        ("transfer", zoo.ListBatch, Data(on_device=True), normalised),
        ("dataset", NormalisedByDataset, zoo.loader(NormalisedByDataset), normalised),
    ]
    for where, shape, data, pixels in cases:

        class Keeping(AdversarialTraining):
            def on_train_batch_end(self, *_: Any, where: str = where, pixels: PixelSpace = pixels) -> None:
                seen[where] = pixels.to_pixels(self._perturbed())

        threat = ThreatModel(norm, 0.1 if norm == "linf" else 0.8, pixels)
        module = zoo.built(shape)
        zoo.trainer(max_steps=1, callbacks=[Keeping(PGD(threat, steps=3))]).fit(module, data)
    torch.testing.assert_close(seen["transfer"], seen["model"], rtol=0, atol=2e-6)
    torch.testing.assert_close(seen["dataset"], seen["model"], rtol=0, atol=2e-6)
    assert float((seen["model"] - zoo.images(16)).abs().max()) > 0.05


def test_a_validation_step_that_calls_training_step_is_not_attacked() -> None:
    class Shared(zoo.ListBatch):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

    losses = []
    for callbacks in ([], [AdversarialTraining(PGD(THREAT, steps=2, start="zero"))]):
        module = zoo.built(Shared)
        trainer = zoo.trainer(callbacks=callbacks, num_sanity_val_steps=0, limit_train_batches=0)
        # Without training batches the weights stay, so any difference would come from an attack in validation.
        trainer.validate(module, zoo.loader(Shared), verbose=False)
        losses.append(float(trainer.callback_metrics["val_loss"]))
    assert losses[0] == losses[1]


def test_inputs_outside_the_bounds_stop_before_the_first_optimizer_step() -> None:
    class Bytes(zoo.ListBatch):
        @staticmethod
        def batch(n: int) -> Any:
            return [zoo.images(n) * 255, zoo.labels(n)]

    trainer = zoo.trainer(callbacks=[AdversarialTraining(THREAT)])
    with pytest.raises(ValueError, match=r"\[0, 1\], got \[.*0\.\.255 images.*bounds=\(0, 255\)"):
        trainer.fit(zoo.built(Bytes), zoo.loader(Bytes))
    assert trainer.global_step == 0


def test_later_inputs_outside_keep_their_own_bounds_and_are_counted() -> None:
    class Overshooting(zoo.Batches):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return [x + 0.2 * (index > 0), y]

    data = torch.utils.data.DataLoader(Overshooting(zoo.ListBatch, (16, 16, 16)), batch_size=None)
    trainer = zoo.trainer(callbacks=[AdversarialTraining(PGD(THREAT, steps=1))])
    with pytest.warns(UserWarning, match="of 16 inputs leave the pixel bounds"):
        trainer.fit(zoo.built(zoo.ListBatch), data)
    assert float(trainer.callback_metrics["robust/train/outside_box"]) == 32


def test_trades_logs_its_terms() -> None:
    trainer = zoo.trainer(callbacks=[AdversarialTraining(PGD(THREAT, steps=2), "trades", beta=2.0)], max_steps=1)
    module = zoo.built(Asymmetric)
    x, y = zoo.ListBatch.batch(16)
    clean = F.cross_entropy(copy.deepcopy(module).train().net(x), y)
    trainer.fit(module, zoo.loader(Asymmetric))
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert metrics["robust/train/kl_weight"] == 2.0
    assert metrics["robust/train/kl"] > 0
    assert metrics["robust/train/clean_loss"] == pytest.approx(clean.item(), rel=1e-5)


CONFLICTS: list[tuple[Any, dict[str, Any], str]] = [
    (THREAT, {"method": "trade"}, "one of madry, trades, mart.*Did you mean 'trades'"),
    (PGD(THREAT), {"method": "n-fgsm"}, "brings its own attack.*got pgd10_linf_0.1"),
    (NFGSM(THREAT), {"method": "trades"}, "give a PGD or a ThreatModel, got nfgsm"),
    (PGD(THREAT, start="uniform"), {"method": "trades"}, "start='uniform'. Leave both out"),
    (PGD(THREAT, objective=F.cross_entropy), {"method": "trades"}, "sets objective"),
    (PGD(THREAT), {"beta": 1.0}, "method='trades'"),
    (PGD(THREAT), {"craft_mode": "evaluation"}, "'eval' or 'train'"),
    (PGD(THREAT), {"warmup_epochs": -1}, "must not be negative"),
    (lambda f, x, y: x, {"warmup_epochs": 1}, "has no `threat`"),
]


@pytest.mark.parametrize(("attack", "settings", "says"), CONFLICTS, ids=[str(row[1]) for row in CONFLICTS])
def test_contradictory_settings_are_refused_at_once(attack: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        AdversarialTraining(attack, **settings)


@pytest.mark.parametrize(("first", "second"), [("madry", "n-fgsm"), ("madry", "trades"), ("trades", "trades")])
def test_two_adversaries_on_one_step_are_refused_before_training(first: str, second: str) -> None:
    both = [AdversarialTraining(THREAT, first, name="a"), AdversarialTraining(THREAT, second, name="b")]
    trainer = zoo.trainer(callbacks=both)
    module = zoo.built(zoo.ListBatch)
    with pytest.raises(RuntimeError, match="both want to attack"):
        trainer.fit(module, zoo.loader(zoo.ListBatch))
    assert trainer.global_step == 0
    assert "training_step" not in vars(module)


def test_any_callable_is_an_attack_and_is_held_to_its_threat() -> None:
    class Brighten:
        threat = THREAT

        def __init__(self, by: float) -> None:
            self.by = by

        def __call__(self, logits_fn: Any, x: Tensor, y: Tensor) -> Tensor:
            return (x + self.by).clamp(0, 1)

    zoo.trainer(callbacks=[AdversarialTraining(Brighten(0.1))]).fit(zoo.built(zoo.ListBatch), zoo.loader(zoo.ListBatch))
    with pytest.raises(RuntimeError, match=r"Brighten moved an input by 0\.2.*promised at most 0\.1"):
        zoo.trainer(callbacks=[AdversarialTraining(Brighten(0.2))]).fit(
            zoo.built(zoo.ListBatch), zoo.loader(zoo.ListBatch)
        )


def test_trades_with_a_hand_written_loss_trains_on_the_same_gradient_and_one_more_forward() -> None:
    class HandWritten(Asymmetric):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return -self.net(x).log_softmax(1).gather(1, y[:, None]).mean()

    told = {"logits_fn": lambda module, batch: module.net(batch[0]), "target_key": 1}
    weights, counts = [], []
    for shape, settings in ((Asymmetric, {}), (HandWritten, told)):
        _, after = one_step(AdversarialTraining(PGD(THREAT, steps=2), "trades", **settings), shape)
        weights.append(torch.cat([p.detach().flatten() for p in after.parameters()]))
        counts.append(int(after.net[1].num_batches_tracked))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)
    assert counts == [2, 3]


def test_beside_a_tuner_it_says_that_the_tuner_fits_clean_training(caplog: pytest.LogCaptureFixture) -> None:
    tuner = type("LearningRateFinder", (pl.Callback,), {})()  # known by its name in both namespaces
    with caplog.at_level("INFO", logger="lightning_robust"):
        callbacks = [AdversarialTraining(PGD(THREAT, steps=1)), tuner]
        zoo.trainer(max_steps=1, callbacks=callbacks).fit(zoo.built(zoo.ListBatch), zoo.loader(zoo.ListBatch))
    assert "tuners run without callbacks" in caplog.text


def test_bf16_mixed_trains_with_trades(recwarn: pytest.WarningsRecorder) -> None:
    module = zoo.built(Asymmetric)
    before = copy.deepcopy(module.state_dict())
    trainer = zoo.trainer(precision="bf16-mixed", callbacks=[AdversarialTraining(PGD(THREAT, steps=2), "trades")])
    trainer.fit(module, zoo.loader(Asymmetric))
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())
    assert not torch.equal(before["net.0.weight"], module.state_dict()["net.0.weight"])


@pytest.mark.slow
def test_adversarial_training_holds_where_standard_training_falls() -> None:
    from lightning_robust import RobustAccuracy
    from lightning_robust.demo import Classifier, Digits

    threat = ThreatModel("linf", 0.2)
    robust: dict[str, float] = {}
    for name, callbacks in {"standard": [], "n-fgsm": [AdversarialTraining(threat, "n-fgsm", warmup_epochs=3)]}.items():
        pl.seed_everything(0, verbose=False)
        report = RobustAccuracy(PGD(threat, steps=20, restarts=2), max_samples=250, stages=["test"])
        trainer = zoo.trainer(max_epochs=10, callbacks=[*callbacks, report], limit_val_batches=0)
        data = Digits()
        module = Classifier()
        trainer.fit(module, data)
        trainer.test(module, data, verbose=False)
        robust[name] = float(trainer.callback_metrics["robust/test/accuracy"])
    assert robust["standard"] < 0.05
    assert robust["n-fgsm"] > 0.85


# -- several inputs --------------------------------------------------------------------------------------------------


class TwoInputs(zoo.Shape):
    def __init__(self) -> None:
        super().__init__()
        self.second = torch.nn.Linear(5, 10)

    @staticmethod
    def batch(n: int) -> Any:
        rows = torch.randn(n, 5, generator=torch.Generator().manual_seed(3))
        return {"picture": zoo.images(n), "label": zoo.labels(n), "rows": rows}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.nn.functional.cross_entropy(
            self.net(batch["picture"]) + self.second(batch["rows"]), batch["label"]
        )


@pytest.mark.parametrize("method", ["madry", "trades"])
def test_each_of_several_inputs_stays_in_its_own_ball_and_they_climb_together(method: str) -> None:
    picture, rows = ThreatModel("linf", 0.1), ThreatModel("l2", 0.5, PixelSpace(bounds=None))
    fed: list[Any] = []

    class Keeping(AdversarialTraining):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            route = self.probe.routes["training_step"]
            fed.append({path[0]: x for path, x in route.inputs.into(batch, self._perturbed()).items()})

    attack = PGD(JointThreat((picture, rows)), steps=4)
    callback = Keeping(attack, method, input_key=["picture", "rows"])
    module, batch = zoo.built(TwoInputs), TwoInputs.batch(16)
    before = copy.deepcopy(module).eval()
    zoo.trainer(callbacks=[callback], max_steps=1).fit(module, zoo.loader(TwoInputs))
    moved = {key: fed[0][key] for key in ("picture", "rows")}
    assert float((moved["picture"] - batch["picture"]).abs().max()) == pytest.approx(0.1, rel=1e-5)
    assert float((moved["rows"] - batch["rows"]).norm(dim=1).max()) == pytest.approx(0.5, rel=1e-5)

    def loss(**changed: Tensor) -> float:
        with torch.no_grad():
            return float(before.training_step({**batch, **changed}, 0))

    assert loss() < min(loss(picture=moved["picture"]), loss(rows=moved["rows"])) < loss(**moved)
