"""Every penalty trains what a step that calls it trains, beside attacks and in the steps of strangers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from callbacks.penalised_runs import (
    OTHERS,
    THREAT,
    WEIGHT,
    Attention,
    NoDropout,
    OneBackward,
    Smooth,
    Triple,
    TwoBackwards,
    built_from_recipe,
    compiled,
    data,
    drawing,
    fitted,
    flat,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import (
    PGD,
    AdversarialTraining,
    InputGradientPenalty,
    RandomFill,
    RightReasons,
    RobustTrainingMixin,
    SaliencyRegularization,
    ThreatModel,
)
from lightning_robust.callbacks.adversarial_training import AdversarialTraining as Adversarial
from lightning_robust.penalties import AttributionPrior, JacobianPenalty, SaliencyConsistency, SaliencyGuided
from lightning_robust.randomness import RandomState

ATTACKS = {"strong": PGD(ThreatModel("linf", 0.3), steps=3, start="zero")}


# -- the weights -----------------------------------------------------------------------------------------------------


def called_in_the_step(shape: type[Any], penalty: Any, weight: float = WEIGHT) -> type[Any]:
    """The module of a stranger who calls the penalty itself, on the random numbers of the callback."""

    class Written(shape):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            (x, y), start = batch, RandomState.capture()
            loss = super().training_step(batch, batch_idx)
            end, buffers = RandomState.capture(), [b.clone() for b in self.buffers()]
            start.restore()
            term = penalty(self.net, x, y, generator=drawing(penalty, self.global_step, batch_idx))
            end.restore()
            for buffer, before in zip(self.buffers(), buffers, strict=True):
                buffer.data.copy_(before)
            return loss + weight * term

    return Written


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_other_penalties_train_the_weights_of_a_step_that_calls_them(name: str, settings: dict[str, Any]) -> None:
    expected = flat(fitted(called_in_the_step(zoo.ListBatch, OTHERS[name]), **settings))
    found = flat(fitted(zoo.ListBatch, SaliencyRegularization(OTHERS[name], WEIGHT), **settings))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert float((flat(fitted(zoo.ListBatch, **settings)) - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("name", OTHERS)
def test_under_bf16_other_penalties_move_the_weights_as_in_a_step_that_calls_them(name: str) -> None:
    settings: dict[str, Any] = {"precision": "bf16-mixed", "max_steps": 1}
    weight = {"guided": 5.0, "consistency": 10.0}.get(name, WEIGHT)  # enough to be told from rounding
    expected = flat(fitted(called_in_the_step(Smooth, OTHERS[name], weight), **settings))
    found = flat(fitted(Smooth, SaliencyRegularization(OTHERS[name], weight), **settings))
    whole = float((flat(zoo.built(Smooth)) - expected).norm())
    assert float((found - expected).norm()) < 0.02 * whole  # products of 8 bits, summed in another order
    assert float((flat(fitted(Smooth, **settings)) - expected).norm()) > 0.04 * whole


@pytest.mark.parametrize("name", OTHERS)
def test_other_penalties_join_a_manual_backward_pass(name: str) -> None:
    several, one = (
        fitted(shape, SaliencyRegularization(OTHERS[name], WEIGHT)) for shape in (TwoBackwards, OneBackward)
    )
    torch.testing.assert_close(flat(several), flat(one), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(flat(one), flat(fitted(OneBackward)), rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "attack"), [*((name, "madry") for name in OTHERS), ("jacobian", "trades"), ("consistency", "trades")]
)
def test_beside_an_attack_other_penalties_may_stand_anywhere(name: str, attack: str) -> None:
    def both() -> list[Any]:
        return [AdversarialTraining(PGD(THREAT, steps=2), attack), SaliencyRegularization(OTHERS[name], WEIGHT)]

    one, other = fitted(zoo.ListBatch, *both()), fitted(zoo.ListBatch, *reversed(both()))
    # Not to the last bit: autograd sums over the forwards of a step in the order in which they were made.
    torch.testing.assert_close(flat(one), flat(other), rtol=1e-5, atol=1e-6)
    assert float((flat(one) - flat(fitted(zoo.ListBatch, both()[0]))).abs().max()) > 1e-4


@pytest.mark.parametrize("name", OTHERS)
def test_other_penalties_of_weight_zero_change_nothing_buffers_and_random_streams_included(name: str) -> None:
    for shape in (zoo.SharedStepWithMetrics, zoo.NumpyMixup):
        assert torch.equal(flat(fitted(shape, SaliencyRegularization(OTHERS[name], 0.0))), flat(fitted(shape)))


@pytest.mark.parametrize("shape", [s for s in zoo.ZOO if s is not zoo.ManualOptimisation], ids=lambda s: s.__name__)
def test_other_penalties_run_in_the_steps_of_strangers(shape: type[Any]) -> None:
    plain = flat(fitted(shape, max_steps=2))
    for name, penalty in OTHERS.items():
        found = flat(fitted(shape, SaliencyRegularization(penalty, 10 * WEIGHT), max_steps=2))
        assert bool(found.isfinite().all()), name
        assert float((found - plain).abs().max()) > 1e-4, name
    together = [SaliencyRegularization(p, WEIGHT, name=f"n{i}") for i, p in enumerate(OTHERS.values())]
    assert bool(flat(fitted(shape, *together, max_steps=2)).isfinite().all())


# -- consistency -----------------------------------------------------------------------------------------------------


def _assert_step(before: Any, after: Any, loss: Tensor) -> None:
    parameters = dict(before.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    for (name, old), gradient in zip(parameters.items(), gradients, strict=True):
        torch.testing.assert_close(old - after.get_parameter(name), gradient, rtol=1e-4, atol=2e-6, msg=name)


def test_consistency_compares_the_attacked_input_with_the_clean_one_of_the_same_step() -> None:
    attacked: list[Tensor] = []

    class Keeping(Adversarial):
        def on_train_batch_end(self, *_: Any) -> None:
            attacked.append(self._perturbed().clone())

    penalty, before = SaliencyConsistency(ATTACKS["strong"]), zoo.built(Smooth)
    after = fitted(Smooth, Keeping(ATTACKS["strong"]), SaliencyRegularization(penalty, WEIGHT), max_steps=1)
    (adversarial,), (x, y) = attacked, zoo.ListBatch.batch(16)
    term = SaliencyConsistency()(before.net, adversarial, y, clean=x)
    loss = F.cross_entropy(before.net(adversarial), y) + WEIGHT * term
    assert float(term.detach()) > 1e-3
    _assert_step(before, after, loss)


class ByHand(RobustTrainingMixin, Smooth):
    """A step that asks for the attacked batch and for the penalty itself."""

    by_hand = True

    def configure_robustness(self) -> list[Any]:
        return [AdversarialTraining(ATTACKS["strong"]), SaliencyRegularization(SaliencyConsistency(), 10.0)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.perturbed(batch)
        return self.robust_loss(F.cross_entropy(self.net(x), y))


def test_a_step_that_asks_for_its_attacked_batch_gives_consistency_the_same_pair() -> None:
    defences = [AdversarialTraining(ATTACKS["strong"]), SaliencyRegularization(SaliencyConsistency(), 10.0)]
    expected = flat(fitted(Smooth, *defences, max_steps=1))
    torch.testing.assert_close(flat(fitted(ByHand, max_steps=1)), expected, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(expected, flat(fitted(Smooth, defences[0], max_steps=1)), atol=1e-4)


@pytest.mark.parametrize("beside", [[], [AdversarialTraining(PGD(ThreatModel("linf", 0.3), steps=1), "trades")]])
def test_without_an_attacked_batch_consistency_crafts_its_own_in_evaluation_mode(beside: list[Any]) -> None:
    penalty, before = SaliencyConsistency(ATTACKS["strong"]), zoo.built(Smooth)
    logged: dict[str, float] = {}

    class Reading(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            logged.update({key: float(value) for key, value in trainer.callback_metrics.items()})

    module = fitted(Smooth, *beside, SaliencyRegularization(penalty, WEIGHT), Reading(), max_steps=1)
    x, y = zoo.ListBatch.batch(16)
    adversarial = ATTACKS["strong"](before.net, x, y)
    term = SaliencyConsistency()(before.net, x, y, attacked=adversarial)
    assert logged["robust/train/saliency_consistency"] == pytest.approx(WEIGHT * float(term.detach()), rel=1e-4)
    if not beside:
        _assert_step(before, module, F.cross_entropy(before.net(x), y) + WEIGHT * term)


def test_crafting_for_a_penalty_moves_no_running_statistics_and_no_flags() -> None:
    module = fitted(zoo.ListBatch, SaliencyRegularization(SaliencyConsistency(ATTACKS["strong"]), WEIGHT))
    assert int(module.net[1].num_batches_tracked) == 3
    plain = fitted(zoo.ListBatch, max_steps=1)
    one = fitted(zoo.ListBatch, SaliencyRegularization(SaliencyConsistency(ATTACKS["strong"]), WEIGHT), max_steps=1)
    for (name, buffer), (_, other) in zip(plain.named_buffers(), one.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name


def test_an_own_attack_is_held_to_its_pixels_in_the_first_step() -> None:
    callback = SaliencyRegularization(SaliencyConsistency(PGD(THREAT, steps=1)))
    loader = DataLoader(TensorDataset(zoo.images(16) * 3 - 1, zoo.labels(16)), 16)
    with pytest.raises(ValueError, match=r"within \[0, 1\], got \[-"):
        fitted(zoo.ListBatch, callback, loader=loader)


@pytest.mark.parametrize(
    ("beside", "attack", "says"),
    [
        ("madry", None, "against the clean one"),
        ("trades", None, "against noise of its own"),
        ("mart", None, "against the clean one"),
        ("trades", ATTACKS["strong"], "against its own attack"),
        (None, None, "against noise of its own"),
    ],
)
def test_at_the_start_it_is_said_what_explanations_are_compared_with(
    beside: Any, attack: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(SaliencyRegularization, "say", lambda _, __, message: lines.append(message))
    others = [AdversarialTraining(PGD(THREAT, steps=1), beside)] if beside else []
    fitted(Smooth, *others, SaliencyRegularization(SaliencyConsistency(attack)), max_steps=1)
    assert f"at the fed batch {says};" in lines[0]


# -- random numbers, forwards, recipes -------------------------------------------------------------------------------


def test_random_numbers_of_a_penalty_are_a_function_of_the_seed_the_step_and_the_batch() -> None:
    seen: list[list[float]] = []

    def noisy(logits_fn: Any, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        seen[-1].append(float(torch.rand((), generator=generator)))
        return logits_fn(x).square().mean()

    for seed, accumulate in ((0, 1), (0, 1), (1, 1), (0, 3)):
        seen.append([])
        callback = SaliencyRegularization(noisy, seed=seed)
        fitted(zoo.ListBatch, callback, loader=data(), accumulate_grad_batches=accumulate)
    assert seen[0] == seen[1]
    assert not set(seen[0]) & set(seen[2])
    for numbers in seen:
        assert numbers[0] == numbers[1]  # the check before the first step, and that step
        assert len(set(numbers)) == 3


def test_two_callbacks_of_one_seed_draw_other_numbers() -> None:
    seen: dict[str, Tensor] = {}

    def one(logits_fn: Any, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        seen.setdefault(f"one {len(seen)}", torch.rand(3, generator=generator))
        return logits_fn(x).square().mean()

    def other(logits_fn: Any, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        seen.setdefault(f"other {len(seen)}", torch.rand(3, generator=generator))
        return logits_fn(x).square().mean()

    fills = [RandomFill(2), RandomFill(2, name="second")]
    masked = TensorDataset(zoo.images(16), zoo.labels(16), torch.ones(16, 1, 8, 8))
    filled: list[Tensor] = []

    class Keeping(Triple):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            filled.append(batch[0].detach().clone())
            return super().training_step(batch, batch_idx)

    for fill in fills:
        fitted(Keeping, fill, loader=DataLoader(masked, 16), max_steps=1)
    callbacks = [SaliencyRegularization(p, name=name) for p, name in ((one, None), (other, None), (one, "second"))]
    for callback in callbacks:
        fitted(Keeping, callback, loader=DataLoader(masked, 16), max_steps=1)
    drawn = list({tuple(numbers.tolist()) for numbers in seen.values()})
    assert len(drawn) == 3
    assert len({tuple(x.flatten()[:3].tolist()) for x in filled if not torch.equal(x, zoo.images(16))}) == 2
    assert not {tuple(x.flatten()[:3].tolist()) for x in filled} & set(drawn)


class Segmenting(zoo.Shape):
    """A class for each pixel; the loss is given rows of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1))

    @staticmethod
    def batch(n: int) -> Any:
        return [zoo.images(n), torch.arange(64 * n).view(n, 8, 8) % 3, torch.ones(n, 1, 8, 8)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Flattening(Segmenting):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]).movedim(1, -1).reshape(-1, 3), batch[1].flatten())


@pytest.mark.parametrize("name", [*OTHERS, "input_gradient", "right_reasons"])
def test_a_step_that_flattens_its_logits_trains_as_one_that_does_not(name: str) -> None:
    more: dict[str, Any] = {"input_gradient": InputGradientPenalty(), "right_reasons": RightReasons(2)}
    penalty = {**OTHERS, **more}[name]
    if isinstance(penalty, JacobianPenalty):
        penalty = JacobianPenalty(192, "double_backward")  # one direction means another one in another order
    weight = 1e4 if name == "right_reasons" else 2.0
    rows, pixels = (fitted(s, SaliencyRegularization(penalty, weight), max_steps=2) for s in (Flattening, Segmenting))
    torch.testing.assert_close(flat(rows), flat(pixels), rtol=1e-3, atol=2e-5)
    assert float((flat(rows) - flat(fitted(Flattening, max_steps=2))).abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("penalty", "each"),
    [
        (JacobianPenalty(3), 4),
        (JacobianPenalty(3, "double_backward"), 1),
        (SaliencyGuided(), 2),
        (AttributionPrior(samples=2), 3),
        (SaliencyConsistency(), 2),
    ],
    ids=lambda p: getattr(p, "name", ""),
)
def test_other_penalties_cost_the_forwards_that_their_table_says(penalty: Any, each: int) -> None:
    calls: list[int] = []
    seen: list[int] = []
    module = zoo.built(zoo.ListBatch)
    module.net.register_forward_hook(lambda *_: calls.append(1))

    class Counting(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(len(calls))

    zoo.trainer(callbacks=[SaliencyRegularization(penalty), Counting()]).fit(module, data(64))
    assert [b - a for a, b in itertools.pairwise(seen)] == [each] * 3


@pytest.mark.parametrize(
    ("kind", "arguments", "expected"),
    [
        ("JacobianPenalty", "{projections: 2, method: double_backward}", JacobianPenalty(2, "double_backward")),
        ("SaliencyGuided", "{share: 0.3, channel_dim: null}", SaliencyGuided(0.3, None)),
        ("AttributionPrior", "{prior: gini, samples: 2}", AttributionPrior("gini", 2)),
        ("SaliencyConsistency", "{noise: 0.2}", SaliencyConsistency(noise=0.2)),
        (
            "SaliencyConsistency",
            "{attack: {class_path: lightning_robust.PGD, init_args: {threat: {norm: linf, eps: 0.1}, steps: 2}}}",
            SaliencyConsistency(PGD(THREAT, steps=2)),
        ),
    ],
)
def test_recipes_build_every_penalty(kind: str, arguments: str, expected: Any, tmp_path: Path) -> None:
    found = built_from_recipe(tmp_path, f"lightning_robust.penalties.{kind}", arguments, "0.1")
    assert found.penalty == expected


# -- what cannot be trained ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["variation", "consistency", "jacobian, two, exact"])
def test_attention_says_no_to_other_second_derivatives_before_training(name: str) -> None:
    trainer = zoo.trainer(callbacks=[SaliencyRegularization(OTHERS[name])])
    with pytest.raises(RuntimeError, match=r"no second derivative.*SDPBackend\.MATH.*method='finite_differences'"):
        trainer.fit(zoo.built(Attention), data())
    assert trainer.global_step == 0
    fitted(Attention, *(SaliencyRegularization(OTHERS[other]) for other in ("jacobian", "guided")), loader=data())


class Checkpointed(NoDropout):
    """Computes its activations again in the backward pass, in the old way."""

    def forward(self, x: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")  # checkpoint's own
@pytest.mark.parametrize("name", OTHERS)
def test_reentrant_checkpoints_are_told_before_training(name: str) -> None:
    trainer = zoo.trainer(callbacks=[SaliencyRegularization(OTHERS[name])])
    with pytest.raises(RuntimeError, match=r"use_reentrant=False"):
        trainer.fit(zoo.built(Checkpointed), data())
    assert trainer.global_step == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("name", OTHERS)
def test_of_other_penalties_a_compiled_network_takes_those_of_first_derivatives(name: str) -> None:
    trainer = zoo.trainer(callbacks=[SaliencyRegularization(OTHERS[name], WEIGHT)])
    module = compiled("wrapped")
    if getattr(OTHERS[name], "method", None) == "double_backward":
        with pytest.raises(RuntimeError, match=r"compiled network has no second derivative. Use .*, or leave the"):
            trainer.fit(module, data())
        assert trainer.global_step == 0
        return
    trainer.fit(module, data())
    expected = fitted(NoDropout, SaliencyRegularization(OTHERS[name], WEIGHT), loader=data())
    torch.testing.assert_close(flat(module), flat(expected), rtol=1e-4, atol=1e-5)
