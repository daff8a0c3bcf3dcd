"""Attacks of torchattacks and foolbox run on our models: the same pixels as ours, and none of their side effects."""

from __future__ import annotations

import contextlib
import gc
import random
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import trainer_runs
import zoo
from torch import Tensor, nn

from lightning_robust import PGD, AdversarialTraining, PixelSpace, RobustAccuracy, ThreatModel
from lightning_robust.attacks import guard
from lightning_robust.attacks.adapters import from_foolbox, from_torchattacks
from lightning_robust.randomness import seeded


def peer(name: str) -> Any:
    """An outside implementation; what it warns about while it is imported is not about us."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


torchattacks, foolbox = peer("torchattacks"), peer("foolbox")
EPS, ALPHA = 0.06, 0.02
THREAT = ThreatModel("linf", EPS)
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
SPACE = PixelSpace(mean=MEAN, std=STD)
NOBODY = nn.Identity()  # the model that an attack was built around, which must not matter


@pytest.fixture
def net() -> nn.Module:
    """A small convolutional net without any symmetry, whose BatchNorm is frozen while the rest trains."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.GELU(), nn.Conv2d(6, 4, 3, stride=2), nn.Flatten(), nn.LazyLinear(5)
    )
    net.train()(torch.randn(32, 3, 8, 8))
    net[1].eval()
    return net


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    x[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    return x, torch.arange(8) % 5


def quiet(name: str, **settings: Any) -> Any:
    """An attack of torchattacks around a model without parameters, which it prints a remark about."""
    with contextlib.redirect_stdout(None):
        return getattr(torchattacks, name)(NOBODY, **settings)


def their_pgd(steps: int = 10, **settings: Any) -> Any:
    return quiet("PGD", **{"eps": EPS, "alpha": ALPHA, "steps": steps, "random_start": False, **settings})


def ours(threat: ThreatModel = THREAT, steps: int = 10) -> PGD:
    return PGD(threat, steps=steps, step_size=ALPHA, start="zero")


# -- the same pixels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["in the model", "in the data", "nowhere"])
@pytest.mark.parametrize("library", ["torchattacks", "foolbox"])
def test_every_pixel_is_that_of_our_pgd_wherever_the_normalisation_stands(
    net: nn.Module, batch: tuple[Tensor, Tensor], where: str, library: str
) -> None:
    pixels, y = batch
    threat = ThreatModel("linf", EPS, SPACE) if where == "in the data" else THREAT
    x = SPACE.to_model(pixels) if where == "in the data" else pixels
    logits_fn: Any = (lambda p: net(SPACE.to_model(p))) if where == "in the model" else net
    theirs = (
        from_torchattacks(their_pgd(), threat)
        if library == "torchattacks"
        else from_foolbox(foolbox.attacks.LinfPGD(abs_stepsize=ALPHA, steps=10, random_start=False), threat)
    )
    found, expected = (threat.pixels.to_pixels(attack(logits_fn, x, y)) for attack in (theirs, ours(threat)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert float((found - pixels).abs().max()) > 0.9 * EPS


def test_pixels_in_0_to_255_are_those_of_our_pgd_for_foolbox(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    threat = ThreatModel("linf", 255 * EPS, PixelSpace(bounds=(0, 255)))
    attack = from_foolbox(foolbox.attacks.LinfPGD(rel_stepsize=1 / 3, steps=10, random_start=False), threat)
    found = attack(lambda p: net(p / 255), 255 * batch[0], batch[1])
    torch.testing.assert_close(found / 255, ours()(net, *batch), rtol=0, atol=1e-6)


def test_a_radius_that_a_callback_changes_reaches_the_attack_with_its_step(
    net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    threat = THREAT.scaled(0.5)
    adapted = from_torchattacks(their_pgd(), THREAT)
    half = type(adapted)(adapted.attack, threat)
    expected = PGD(threat, steps=10, step_size=ALPHA / 2, start="zero")(net, *batch)
    torch.testing.assert_close(half(net, *batch), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(adapted(net, *batch), ours()(net, *batch), rtol=0, atol=1e-6)


def test_inputs_beyond_the_bounds_keep_their_distance(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x = batch[0] * 1.5 - 0.2  # augmentation that overshoots
    threat = THREAT.widened()
    for attack in (from_torchattacks(their_pgd(), threat), from_foolbox(foolbox.attacks.LinfPGD(steps=5), threat)):
        found = guard(attack)(net, x, batch[1])  # raises if ball or box are left
        assert float((found - x).abs().max()) > 0.9 * EPS
    with pytest.raises(ValueError, match="expected pixels within"):
        from_torchattacks(their_pgd(), THREAT)(net, x, batch[1])


# -- every mode -----------------------------------------------------------------------------------------------------


def test_targets_are_chosen_by_the_model_that_is_attacked(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    attack = their_pgd(eps=0.3, alpha=0.06)
    attack.set_mode_targeted_least_likely(quiet=True)
    threat = ThreatModel("linf", 0.3)
    found = from_torchattacks(attack, threat)(net, x, y)
    expected = PGD(threat, steps=10, step_size=0.06, start="zero", targeted="least-likely")(net, x, y)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    attack.set_mode_targeted_by_function(lambda images, labels: (labels + 1) % 5, quiet=True)
    found = from_torchattacks(attack, threat)(net, x, y)
    expected = PGD(threat, steps=10, step_size=0.06, start="zero", targeted="given")(net, x, (y + 1) % 5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_multi_attack_runs_all_its_parts_on_the_model_that_it_is_given(
    net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, y, threat = batch[0], net(batch[0]).argmax(1), ThreatModel("linf", 0.3)
    weak, strong = (their_pgd(eps=0.3, alpha=alpha) for alpha in (0.014, 0.05))
    with contextlib.redirect_stdout(None):
        both = torchattacks.MultiAttack([weak, strong])
    found = from_torchattacks(both, threat)(net, x, y)
    fooled = [net(from_torchattacks(part, threat)(net, x, y)).argmax(1) != y for part in (weak, strong)]
    assert torch.equal(net(found).argmax(1) != y, fooled[0] | fooled[1])
    assert 0 < int(fooled[0].sum()) < int(fooled[1].sum())  # both parts had something to do
    assert both.model is NOBODY
    assert weak.model is NOBODY


@pytest.mark.parametrize(
    ("name", "settings"), [("CW", {"c": 1000, "lr": 0.1, "steps": 20}), ("DeepFool", {"steps": 5})]
)
def test_what_looks_for_the_nearest_mistake_is_held_to_the_radius(
    net: nn.Module, batch: tuple[Tensor, Tensor], name: str, settings: dict[str, Any]
) -> None:
    x = batch[0]
    y, far, near = net(x).argmax(1), ThreatModel("l2", 10.0), ThreatModel("l2", 0.2)
    moved = far.distance(guard(from_torchattacks(quiet(name, **settings), far))(net, x, y), x)
    held = near.distance(guard(from_torchattacks(quiet(name, **settings), near))(net, x, y), x)
    assert float(moved.max()) > 0.5
    torch.testing.assert_close(held, moved.clamp(max=0.2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("outputs", [(), (1,)], ids=["(N,)", "(N, 1)"])
def test_a_yes_no_output_is_two_classes(outputs: tuple[int, ...]) -> None:
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0])
    x, y = torch.full((4, 4, 1, 1), 0.5), torch.arange(4) % 2
    found = from_torchattacks(their_pgd(), THREAT)(
        lambda p: (p.flatten(1) @ weight).reshape(len(p), *outputs), x, y.float().reshape(len(y), *outputs)
    )
    uphill = (weight.sign() * (1 - 2 * y).unsqueeze(1)).view_as(x)
    torch.testing.assert_close(found, x + EPS * uphill, rtol=0, atol=1e-6)


def test_label_probabilities_are_their_likeliest_class(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    soft = torch.nn.functional.one_hot(batch[1], 5) * 0.9 + 0.02
    attack = from_torchattacks(their_pgd(), THREAT)
    assert torch.equal(attack(net, batch[0], soft), attack(net, *batch))


def test_what_an_adapter_cannot_do_is_refused_with_the_remedy(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\].*got bounds \(0.0, 255.0\)"):
        from_torchattacks(their_pgd(), ThreatModel("linf", EPS, PixelSpace(bounds=(0, 255))))
    with pytest.raises(ValueError, match=r"PGD has radius 0\.06, but the threat model is linf_0\.1: make them equal"):
        from_torchattacks(their_pgd(), ThreatModel("linf", 0.1))
    normalised, given = their_pgd(), their_pgd()
    normalised.set_normalization_used(MEAN, STD)
    given.set_mode_targeted_by_label(quiet=True)
    with pytest.raises(ValueError, match="leave set_normalization_used"):
        from_torchattacks(normalised, THREAT)
    with pytest.raises(ValueError, match="set_mode_targeted_by_function"):
        from_torchattacks(given, THREAT)
    with pytest.raises(TypeError, match="takes an attack of torchattacks, got PGD"):
        from_torchattacks(ours(), THREAT)
    with pytest.raises(ValueError, match="distances in the l2 norm, but the threat model is linf_0"):
        from_foolbox(foolbox.attacks.L2PGD(), THREAT)
    with pytest.raises(ValueError, match="needs pixel bounds"):
        from_foolbox(foolbox.attacks.LinfPGD(), ThreatModel("linf", EPS, PixelSpace(bounds=None)))
    with pytest.raises(ValueError, match="one prediction a sample"):
        from_torchattacks(their_pgd(), THREAT)(lambda p: p, batch[0], batch[1])
    local: Any = THREAT.within(eps=torch.full((8,), EPS))
    adapted = from_torchattacks(their_pgd(), THREAT)
    with pytest.raises(ValueError, match=r"one radius and one input, got a LocalThreat.*eps_key="):
        type(adapted)(adapted.attack, local)(net, *batch)
    with pytest.raises(RuntimeError, match="do not depend on the input"):
        adapted(lambda p: net(p).detach(), *batch)


class PixelsAndMore:
    """Logits that use another entry of the batch beside the pixels."""

    divisible = True

    def __init__(self, net: nn.Module, extra: Tensor) -> None:
        self.net, self.extra = net, extra

    def __call__(self, x: Tensor) -> Tensor:
        return self.net(x) + self.extra[: len(x)]

    def at(self, rows: Tensor) -> PixelsAndMore:
        return PixelsAndMore(self.net, self.extra[rows])


def test_rows_are_not_mixed_up_where_logits_use_more_than_pixels(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    whole, apart = (
        from_torchattacks(their_pgd(), THREAT),
        from_torchattacks(quiet("Square", eps=EPS, n_queries=5), THREAT),
    )
    reads = PixelsAndMore(net, torch.randn(8, 5))
    torch.testing.assert_close(whole(reads, *batch), ours()(reads, *batch), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="takes batches apart, but here samples cannot be read by their pixels alone"):
        apart(reads, batch[0], reads(batch[0]).argmax(1) * 0 + net(batch[0])[:1].argmax(1))
    reads.extra.zero_()
    apart(reads, *batch)


# -- no traces ------------------------------------------------------------------------------------------------------


def state_of(module: nn.Module) -> list[Any]:
    """Everything that a foreign attack could change: flags, parameters, buffers, gradients."""
    flags = [part.training for part in module.modules()]
    grads = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in module.parameters()]
    return [flags, grads, {name: value.clone() for name, value in module.state_dict().items()}]


def streams() -> list[Any]:
    _, numbers, at, *_ = np.random.get_state()
    return [torch.get_rng_state(), numbers, at, random.getstate()]


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


FOREIGN: dict[str, Any] = {
    "torchattacks PGD": lambda: from_torchattacks(their_pgd(random_start=True), THREAT),
    "torchattacks CW": lambda: from_torchattacks(quiet("CW", steps=3), ThreatModel("l2", 0.5)),
    "torchattacks Square": lambda: from_torchattacks(quiet("Square", eps=EPS, n_queries=5), THREAT),
    "torchattacks AutoAttack": lambda: from_torchattacks(quiet("AutoAttack", eps=EPS, n_classes=5), THREAT),
    "foolbox PGD": lambda: from_foolbox(foolbox.attacks.LinfPGD(steps=3), THREAT),
    "foolbox DeepFool": lambda: from_foolbox(foolbox.attacks.L2DeepFoolAttack(steps=3), ThreatModel("l2", 0.5)),
}


@pytest.mark.parametrize("name", [name for name in FOREIGN if "AutoAttack" not in name])
@pytest.mark.parametrize("inference", [True, False], ids=["inference mode", "plain"])
def test_nothing_in_the_model_and_no_random_stream_is_moved(
    net: nn.Module, batch: tuple[Tensor, Tensor], name: str, inference: bool
) -> None:
    net[0].weight.grad = torch.ones_like(net[0].weight)
    net[3].weight.requires_grad_(False)
    before, drawn = state_of(net), streams()
    with torch.inference_mode(inference):
        x, y = batch[0].clone(), batch[1].clone()
        found = guard(FOREIGN[name]())(net, x, y, generator=seeded(1))
    assert not found.requires_grad
    assert_same(state_of(net), before)
    assert_same(streams(), drawn)
    assert torch.equal(guard(FOREIGN[name]())(net, *batch, generator=seeded(1)), found)


def test_nothing_of_a_batch_is_kept(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    def logits_fn(x: Tensor) -> Tensor:
        return net(x)

    gone = weakref.ref(logits_fn)
    adapted = from_torchattacks(their_pgd(), THREAT)
    adapted(logits_fn, *batch)
    del logits_fn
    gc.collect()
    assert gone() is None


class FrozenNorm(trainer_runs.Net):
    """BatchNorm stays in eval mode while everything else trains, as in fine-tuning."""

    def on_train_batch_start(self, *args: Any) -> None:
        self.net[1].eval()


def trained(shape: type[zoo.Shape], attack: Any) -> nn.Module:
    """After the first optimizer step over two batches, with learning rate 1: the difference is the gradient."""
    module = zoo.built(shape)
    callback = AdversarialTraining(attack)
    zoo.trainer(max_steps=1, accumulate_grad_batches=2, callbacks=[callback]).fit(module, trainer_runs.data())
    return module


@pytest.mark.parametrize("shape", [trainer_runs.Net, FrozenNorm])
@pytest.mark.parametrize("library", ["torchattacks", "foolbox"])
def test_accumulated_gradients_are_those_of_training_with_our_own_pgd(shape: type[zoo.Shape], library: str) -> None:
    theirs = (
        from_torchattacks(their_pgd(3), THREAT)
        if library == "torchattacks"
        else from_foolbox(foolbox.attacks.LinfPGD(abs_stepsize=ALPHA, steps=3, random_start=False), THREAT)
    )
    found, expected = trained(shape, theirs), trained(shape, ours(steps=3))
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)
    assert [part.training for part in found.modules()] == [part.training for part in expected.modules()]
    start = trainer_runs.flat(zoo.built(shape))
    assert float((trainer_runs.flat(found) - start).norm()) > 0.1


class Witness(pl.Callback):
    """Gives a parameter a gradient, which Lightning lets alone once evaluation began, and looks after every batch."""

    def __init__(self) -> None:
        self.saw: list[Any] = []

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.net[0].weight.grad = torch.ones_like(pl_module.net[0].weight)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        self.saw.append((state_of(pl_module), streams()))

    on_test_start, on_test_batch_end = on_validation_start, on_validation_batch_end


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_monitoring_in_inference_mode_leaves_no_trace(name: str, stage: str) -> None:
    after = []
    for callbacks in ([], [RobustAccuracy({"foreign": FOREIGN[name]()}, max_samples=24)]):
        module, witness = zoo.built(FrozenNorm), Witness()
        trainer = zoo.trainer(callbacks=[witness, *callbacks])
        getattr(trainer, stage)(module, trainer_runs.data(), verbose=False)
        after.append((witness.saw, state_of(module), streams()))
    assert_same(after[1], after[0])
    assert len(after[0][0]) == 3
    key = f"robust/{'val' if stage == 'validate' else 'test'}/accuracy_foreign"
    assert 0 <= float(trainer.callback_metrics[key]) <= 1


def test_robust_accuracy_is_that_of_our_own_pgd() -> None:
    module = zoo.built(trainer_runs.Net)
    threat = ThreatModel("linf", 0.02)
    attacks = {
        "theirs": from_torchattacks(their_pgd(eps=0.02, alpha=0.01), threat),
        "ours": PGD(threat, steps=10, step_size=0.01, start="zero", keep="last", early_exit=False),
    }
    trainer = zoo.trainer(callbacks=[RobustAccuracy(attacks, curve=[0.01])])
    x = zoo.images(48)
    labels = module.eval()(x).argmax(1).detach()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=16)
    trainer.validate(module, loader, verbose=False)
    found, expected = (float(trainer.callback_metrics[f"robust/val/accuracy_{name}"]) for name in attacks)
    assert found == expected
    assert 0.05 < found < 0.95
    assert found <= float(trainer.callback_metrics["robust/val/curve/0.01"])
