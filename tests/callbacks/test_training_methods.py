"""Every method of adversarial training: one step's gradient against plain autograd, schedules, and what is said."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from steps_by_hand import assert_steps_equal, climbed, projected
from torch import Tensor, nn
from torch.nn import functional as F
from trainer_runs import ATTACK, THREAT, Net, flat, weights

from lightning_robust import PGD, AdversarialTraining, RobustTrainingMixin
from lightning_robust.attacks import FGSM
from lightning_robust.callbacks.adversary import Adversary
from lightning_robust.randomness import seeded

X, Y = zoo.ListBatch.batch(16)


def one_step(callback: Any, shape: type[Any] = Net, **settings: Any) -> tuple[Any, Any, list[Tensor]]:
    """The module before and after one SGD step at learning rate 1, and what was taken away: the gradient."""
    module = zoo.built(shape)
    before = copy.deepcopy(module)
    zoo.trainer(**{"max_steps": 1, "callbacks": [callback], **settings}).fit(module, zoo.loader(shape))
    pairs = zip(before.parameters(), module.parameters(), strict=True)
    return before, module, [(old - new).detach() for old, new in pairs]


def gradients(module: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters())))


def cross_entropies(net: nn.Module, y: Tensor = Y) -> Any:
    return lambda x: F.cross_entropy(net(x), y, reduction="none")


def attacked(net: nn.Module, x: Tensor = X, y: Tensor = Y, loss: Any = None) -> Tensor:
    """What ATTACK finds in eval mode: two steps from the input itself."""
    net.eval()
    found = x
    for _ in range(ATTACK.steps):
        found = projected(found + 2.5 * THREAT.eps / ATTACK.steps * climbed(loss or cross_entropies(net, y), found), x)
    net.train()
    return found


def divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(1)


def mart_by_hand(p: Tensor, q: Tensor, y: Tensor, beta: float) -> Tensor:
    """Equation 11 of Wang et al. (2020), with plain probabilities: clean ones ``p`` and attacked ones ``q``."""
    right = q.gather(1, y[:, None]).squeeze(1)
    wrong = q.scatter(1, y[:, None], 0.0).amax(1)
    boosted = -right.log() - (1 - wrong).log()
    unsure = 1 - p.gather(1, y[:, None]).squeeze(1)
    return (boosted + beta * divergence(p, q) * unsure).mean()


# -- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [None, 2.0])
def test_mart_is_boosted_cross_entropy_and_the_divergence_of_unsure_samples(beta: float | None) -> None:
    before, after, step = one_step(AdversarialTraining(ATTACK, "mart", beta=beta))
    found = attacked(before.net)
    q, p = before.net(found).softmax(1), before.net(X).softmax(1)  # the step first, then the clean input
    assert_steps_equal(step, gradients(before, mart_by_hand(p, q, Y, 5.0 if beta is None else beta)))
    assert int(after.net[1].num_batches_tracked) == 2
    torch.testing.assert_close(after.net[1].running_mean, before.net[1].running_mean)


class OneLogit(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net[-1] = nn.Linear(4 * 64, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.binary_cross_entropy_with_logits(self.net(x).squeeze(1), (y % 2).float())


def test_mart_on_one_logit_is_mart_on_two_classes() -> None:
    before, after, step = one_step(AdversarialTraining(ATTACK, "mart", beta=3.0), OneLogit)
    net, y = before.net, Y % 2
    found = attacked(net, loss=lambda x: F.softplus(net(x).squeeze(1) * (1 - 2 * y)))

    def two(x: Tensor) -> Tensor:
        p = net(x).sigmoid()
        return torch.cat([1 - p, p], dim=1)

    q, p = two(found), two(X)
    assert_steps_equal(step, gradients(before, mart_by_hand(p, q, y, 3.0)))
    assert int(after.net[1].num_batches_tracked) == 2


@pytest.mark.parametrize("shape", [Net, OneLogit, zoo.SigmoidMultiLabel, zoo.OneLogitBinary, zoo.NumpyMixup])
def test_mart_stays_finite_where_a_network_is_very_sure(shape: type[Any]) -> None:
    class Sure(shape):  # type: ignore[misc]  # a class that is a parameter
        def __init__(self) -> None:
            super().__init__()
            with torch.no_grad():
                self.net[-1].weight.mul_(1e3)

    _, after, step = one_step(AdversarialTraining(ATTACK, "mart"), Sure)
    assert all(bool(value.isfinite().all()) for value in [*after.state_dict().values(), *step])
    assert any(bool(value.any()) for value in step)


def test_fgsm_is_one_step_from_the_input_itself() -> None:
    before, after, step = one_step(AdversarialTraining(THREAT, "fgsm"))
    found = (X + THREAT.eps * climbed(cross_entropies(before.net.eval()), X)).clamp(0, 1)
    assert_steps_equal(step, gradients(before, F.cross_entropy(before.net.train()(found), Y)))
    assert int(after.net[1].num_batches_tracked) == 1


def test_fgsm_rs_is_one_longer_step_from_a_random_start() -> None:
    before, after, step = one_step(AdversarialTraining(THREAT, "fgsm-rs", seed=4))
    start = X + (2 * torch.rand(X.shape, generator=seeded(4, 0, 0, 0)) - 1) * THREAT.eps
    start = start.clamp(0, 1)
    found = projected(start + 1.25 * THREAT.eps * climbed(cross_entropies(before.net.eval()), start), X)
    assert_steps_equal(step, gradients(before, F.cross_entropy(before.net.train()(found), Y)))
    assert int(after.net[1].num_batches_tracked) == 1


class Fed(pl.Callback):
    """Keeps what the step was fed."""

    def __init__(self, of: AdversarialTraining) -> None:
        self.of, self.inputs = of, []

    def on_train_batch_end(self, *_: Any) -> None:
        self.inputs.append(self.of._perturbed().clone())


def shared(seed: int) -> tuple[Any, Any, list[Tensor], list[Tensor]]:
    callback = AdversarialTraining(ATTACK, share=0.5, seed=seed)
    fed = Fed(callback)
    before, after, step = one_step(callback, callbacks=[callback, fed])
    module = zoo.built(Net)
    zoo.trainer(callbacks=[callback, fed], max_epochs=2).fit(module, zoo.loader(Net))
    return before, after, step, fed.inputs


def test_a_share_of_the_samples_is_attacked_and_the_gradient_is_that_of_the_mixed_batch() -> None:
    before, after, step, fed = shared(seed=0)
    moved = (fed[0] != X).flatten(1).any(1)
    assert int(moved.sum()) == 8
    mixed = torch.where(moved.view(-1, 1, 1, 1), attacked(before.net), X)
    assert torch.equal(fed[0][~moved], X[~moved])
    assert_steps_equal(step, gradients(before, F.cross_entropy(before.net(mixed), Y)))
    assert int(after.net[1].num_batches_tracked) == 1
    rows = [tuple((x != X).flatten(1).any(1).nonzero().flatten().tolist()) for x in fed[1:]]
    assert len(set(rows)) == 4  # drawn anew in each of four steps
    assert all(len(drawn) == 8 for drawn in rows)
    assert torch.equal(shared(seed=0)[3][-1], fed[-1])
    assert not torch.equal(shared(seed=1)[3][0] != X, fed[0] != X)


@pytest.mark.parametrize("n", [1, 2])
def test_a_small_last_batch_of_which_no_share_is_a_whole_sample_is_trained_on_all_the_same(n: int) -> None:
    module = zoo.built(Net)
    trainer = zoo.trainer(callbacks=[AdversarialTraining(ATTACK, share=0.2)])
    trainer.fit(module, zoo.loader(Net, (16, n)))
    assert trainer.global_step == 2
    assert bool(flat(module).isfinite().all())


class Teacher(nn.Module):
    """Another network, with a dropout that must be off, handed over in train mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.part = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
        self.devices: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return self.part(x)

    def to(self, *args: Any, **settings: Any) -> Any:
        self.devices += args
        return super().to(*args, **settings)


@pytest.mark.parametrize("method", ["madry", "trades", "mart"])
def test_a_teacher_adds_the_divergence_of_the_attacked_prediction_from_its_clean_one(method: str) -> None:
    teacher = Teacher()
    assert teacher.training
    names = set(zoo.built(Net).state_dict())
    attack = PGD(THREAT, steps=2) if method == "trades" else ATTACK
    before, after, step = one_step(AdversarialTraining(attack, method, teacher=teacher, teacher_weight=0.7))
    taught = teacher.part[2](X.flatten(1)).softmax(1).detach()
    if method == "trades":
        start = (X + 0.001 * torch.randn(X.shape, generator=seeded(0, 0, 0, 0))).clamp(0, 1)
        with torch.no_grad():
            frozen = before.net.eval()(X).softmax(1)
        found = start
        for _ in range(2):
            uphill = climbed(lambda z: divergence(frozen, before.net(z).softmax(1)), found)
            found = projected(found + 2.5 * THREAT.eps / 2 * uphill, X)
        before.net.train()
        p, q = before.net(X).softmax(1), before.net(found).softmax(1)
        loss = F.nll_loss(p.log(), Y) + 6 * divergence(p, q).mean()
    else:
        q = before.net(attacked(before.net)).softmax(1)
        loss = F.nll_loss(q.log(), Y) if method == "madry" else mart_by_hand(before.net(X).softmax(1), q, Y, 5.0)
    assert_steps_equal(step, gradients(before, loss + 0.7 * divergence(taught, q).mean()))
    assert teacher.training  # as it was
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert set(after.state_dict()) == names
    assert teacher.devices == [torch.device("cpu")]
    assert int(after.net[1].num_batches_tracked) == (1 if method == "madry" else 2)


def test_a_teacher_may_be_any_function_and_must_give_the_same_logits() -> None:
    own = Teacher().eval()
    weights_of = [
        flat(one_step(AdversarialTraining(ATTACK, teacher=teacher))[1]) for teacher in (own, lambda x: own(x))
    ]
    assert torch.equal(*weights_of)
    with pytest.raises(ValueError, match=r"teacher= must map the input to logits \(16, 10\).*got \(16, 3\)"):
        one_step(AdversarialTraining(ATTACK, teacher=lambda x: torch.zeros(len(x), 3)))
    with pytest.raises(ValueError, match=r"teacher= must .*got dict. Wrap it"):
        one_step(AdversarialTraining(ATTACK, teacher=lambda x: {"logits": x}))


def test_terms_are_logged_weighted() -> None:
    teacher = Teacher()
    callback = AdversarialTraining(ATTACK, "mart", beta=2.0, teacher=teacher, teacher_weight=0.5)
    module = zoo.built(Net)
    before = copy.deepcopy(module)
    trainer = zoo.trainer(max_steps=1, callbacks=[callback])
    trainer.fit(module, zoo.loader(Net))
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    q, p = before.net(attacked(before.net)).softmax(1), before.net(X).softmax(1)
    wrong = q.scatter(1, Y[:, None], 0.0).amax(1)
    taught = teacher.part[2](X.flatten(1)).softmax(1)
    expected = {
        "margin": -(1 - wrong).log().mean(),
        "kl": 2 * (divergence(p, q) * (1 - p.gather(1, Y[:, None]).squeeze(1))).mean(),
        "distillation": 0.5 * divergence(taught, q).mean(),
        "kl_weight": torch.tensor(2.0),
        "clean_loss": F.nll_loss(p.log(), Y),
    }
    for metric, value in expected.items():
        assert logged[f"robust/train/{metric}"] == pytest.approx(value.item(), rel=1e-4), metric


# -- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "means"), [(0, [1.5, 3.5, 4.0]), (1, [None, 1.5, 3.5])])
def test_the_weight_of_the_divergence_grows_in_every_step(start: int, means: list[float | None]) -> None:
    seen: list[Any] = []

    class Watching(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            seen.append(trainer.callback_metrics.get("robust/train/kl_weight"))

    settings = {"beta": 4.0, "beta_warmup_epochs": 2, "start_epoch": start}
    callback = AdversarialTraining(PGD(THREAT, steps=1), "trades", **settings)
    zoo.trainer(max_epochs=3, callbacks=[callback, Watching()]).fit(zoo.built(Net), zoo.loader(Net))
    assert [None if value is None else float(value) for value in seen] == means


def test_the_radius_grows_from_the_first_epoch_that_is_attacked(monkeypatch: pytest.MonkeyPatch) -> None:
    radii: list[float] = []
    fitted = Adversary.fitted

    def watched(self: Adversary, *args: Any) -> Any:
        radii.append(fitted(self, *args).threat.eps)
        return fitted(self, *args)

    monkeypatch.setattr(Adversary, "fitted", watched)
    callback = AdversarialTraining(ATTACK, warmup_epochs=2, start_epoch=1)
    zoo.trainer(max_epochs=4, callbacks=[callback]).fit(zoo.built(Net), zoo.loader(Net))
    assert radii == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


LATER: list[dict[str, Any]] = [
    {"method": "madry", "share": 0.5},
    {"method": "madry", "awp": 0.01},
    {"method": "madry", "teacher": lambda x: torch.zeros(len(x), 10)},
    {"method": "trades", "awp": 0.01},
    {"method": "mart"},
    {"method": "n-fgsm"},
]


@pytest.mark.parametrize("settings", LATER, ids=[" ".join(map(str, row)) + row["method"] for row in LATER])
def test_before_its_first_epoch_training_is_clean_to_the_last_bit(settings: dict[str, Any]) -> None:
    shape = zoo.SideEffects
    attack = THREAT if settings["method"] == "n-fgsm" else PGD(THREAT, steps=1)
    results = []
    for callbacks in ([], [AdversarialTraining(attack, start_epoch=1, **settings)]):
        module = zoo.built(shape)
        trainer = zoo.trainer(callbacks=callbacks)
        trainer.fit(module, zoo.loader(shape))
        results.append((weights(module), {key: float(value) for key, value in trainer.callback_metrics.items()}))
    assert results[0] == results[1]  # no key of ours either
    module = zoo.built(shape)
    callback = AdversarialTraining(attack, start_epoch=1, **settings)
    trainer = zoo.trainer(callbacks=[callback], max_epochs=2)
    trainer.fit(module, zoo.loader(shape))
    assert "robust/train/accuracy" in trainer.callback_metrics


# -- by hand ---------------------------------------------------------------------------------------------------------


class ByHand(RobustTrainingMixin, zoo.ListBatch):
    by_hand = True
    settings: dict[str, Any] = {}  # noqa: RUF012  # set by each test's own class

    def configure_robustness(self) -> Any:
        return [AdversarialTraining(ATTACK, **self.settings)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.perturbed(batch)
        return self.robust_loss(F.cross_entropy(self(x), y))


@pytest.mark.parametrize("extra", [{}, {"teacher": lambda x: x.flatten(1)[:, :10]}, {"start_epoch": 1}])
def test_mart_by_hand_trains_the_very_same_weights(extra: dict[str, Any]) -> None:
    settings = {"method": "mart", **extra}
    shape = type("Mine", (ByHand,), {"settings": settings})
    trained = []
    for kind, callbacks in ((shape, []), (zoo.ListBatch, [AdversarialTraining(ATTACK, **settings)])):
        module = zoo.built(kind)
        zoo.trainer(max_epochs=2, callbacks=callbacks).fit(module, zoo.loader(kind))
        trained.append(weights(module))
    assert trained[0] == trained[1]


def test_weight_perturbation_by_hand_is_refused() -> None:
    shape = type("Mine", (ByHand,), {"settings": {"awp": 0.01}})
    with pytest.raises(ValueError, match=r"awp= moves the weights before the step.*by_hand = True.*callback instead"):
        zoo.trainer().fit(zoo.built(shape), zoo.loader(shape))


# -- what is refused, and what is said -------------------------------------------------------------------------------

CONFLICTS: list[tuple[Any, dict[str, Any], str]] = [
    (PGD(THREAT), {"method": "fgsm"}, "brings its own attack: give a ThreatModel .or FGSM.*got pgd10"),
    (FGSM(THREAT), {"method": "fgsm-rs"}, "method='fgsm-rs' brings its own attack.*got fgsm_linf_0.1"),
    (FGSM(THREAT, start="uniform"), {"method": "fgsm"}, "method='fgsm' brings its own.*got fgsm-rs_linf_0.1"),
    (FGSM(THREAT), {"method": "n-fgsm"}, "NFGSM with its settings.*got fgsm"),
    (THREAT, {"method": "fgsm", "beta": 1.0}, "beta= weighs the divergence of method='trades' and 'mart'"),
    (THREAT, {"beta_warmup_epochs": 1.0}, "beta= weighs the divergence.*'madry' has none. Leave it out"),
    (THREAT, {"method": "mart", "share": 0.5}, "share= is the part of each batch.*got 0.5 with method='mart'"),
    (THREAT, {"method": "trades", "share": 0.5}, r"methods that feed the step \(madry, n-fgsm, fgsm-rs, fgsm\)"),
    (THREAT, {"share": 0.0}, "above 0 and up to 1"),
    (THREAT, {"share": 1.5}, "above 0 and up to 1"),
    (THREAT, {"overfitting": "stop"}, "'warn', 'switch' or 'ignore', got 'stop'"),
    (THREAT, {"awp": -0.1}, "awp= must not be negative, got -0.1"),
    (THREAT, {"awp_start_epoch": -1}, "awp_start_epoch= must not be negative"),
    (THREAT, {"start_epoch": -1}, "start_epoch= must not be negative, got -1"),
    (THREAT, {"teacher_weight": -1.0}, "teacher_weight= must not be negative"),
    (THREAT, {"method": "mart", "beta": -1.0}, "beta= must not be negative"),
    (THREAT, {"method": "mart", "beta": float("nan")}, "beta= must not be negative, got nan"),
    (THREAT, {"method": "mart", "beta_warmup_epochs": -1.0}, "beta_warmup_epochs= must not be negative"),
    (THREAT, {"method": "marty"}, "Did you mean 'mart'"),
    (THREAT, {"method": "fgsm_rs"}, "Did you mean 'fgsm-rs'"),
]


@pytest.mark.parametrize(("attack", "settings", "says"), CONFLICTS, ids=[str(row[1]) for row in CONFLICTS])
def test_contradictory_settings_are_refused_at_once(attack: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        AdversarialTraining(attack, **settings)


# One clean step, 0.77 for each step of the attack, 1.2 for a second prediction that is trained on, 1 for each training
# forward of weight perturbation, a third for a teacher.
def no_idea(x: Tensor) -> Tensor:
    return torch.zeros(len(x), 10)


LINES: list[tuple[Any, dict[str, Any], str, int]] = [
    (THREAT, {}, "8.7", 1),
    (THREAT, {"share": 0.25}, "2.9", 1),
    (THREAT, {"method": "trades"}, "9.9", 2),
    (THREAT, {"method": "mart"}, "9.9", 2),
    (THREAT, {"method": "n-fgsm"}, "1.8", 1),
    (THREAT, {"method": "fgsm-rs"}, "1.8", 1),
    (THREAT, {"method": "fgsm"}, "1.8", 1),
    (THREAT, {"awp": 0.01}, "9.7", 1),
    (THREAT, {"method": "trades", "awp": 0.01}, "11.9", 2),
    (PGD(THREAT, steps=2, restarts=2), {"teacher": no_idea}, "4.4", 1),
]


@pytest.mark.parametrize(
    ("attack", "settings", "times", "forwards"), LINES, ids=["-".join(map(str, row[1])) + row[2] for row in LINES]
)
def test_the_start_says_what_it_costs_and_what_batchnorm_sees(
    attack: Any, settings: dict[str, Any], times: str, forwards: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="lightning_robust"):
        _, after, _ = one_step(AdversarialTraining(attack, **settings))
    sees = f"BatchNorm sees {forwards} forward{'s' if forwards > 1 else ''} a step"
    assert f"about {times} times the cost of a clean step, {sees}" in caplog.text
    assert int(after.net[1].num_batches_tracked) == forwards
    fed = "clean" if settings.get("method") == "trades" else "attacked"
    assert f"metrics logged by training_step are computed on the {fed} batch." in caplog.text


def test_of_a_foreign_attack_no_cost_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning_robust"):
        one_step(AdversarialTraining(lambda logits_fn, x, y: x))
    assert "cost of a clean step" not in caplog.text
    assert "; BatchNorm sees 1 forward a step" in caplog.text
