"""A penalty that a callback adds trains the weights that the same penalty trains when it is written into the step."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import captum.attr
import pytest
import pytorch_lightning as pl
import torch
import zoo
from callbacks.penalised_runs import (
    METHODS,
    THREAT,
    WEIGHT,
    Attention,
    NoDropout,
    SameOperations,
    Triple,
    compiled,
    data,
    fitted,
    flat,
    penalised,
    squares,
    written_by_hand,
)
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust import (
    PGD,
    AdversarialTraining,
    InputGradientPenalty,
    RightReasons,
    SaliencyRegularization,
    ThreatModel,
)

# -- the weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [s for s in zoo.ZOO if s is not zoo.ManualOptimisation], ids=lambda s: s.__name__)
def test_the_weights_are_those_of_the_penalty_written_into_the_step(shape: type[zoo.Shape], method: str) -> None:
    expected = flat(fitted(written_by_hand(shape, method)))
    torch.testing.assert_close(flat(fitted(shape, penalised(method))), expected, rtol=1e-5, atol=1e-6)
    assert float((flat(fitted(shape)) - expected).abs().max()) > 1e-4  # where a missing penalty would show


class LBFGS(zoo.ListBatch):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 2},
    "clipped by norm": {"gradient_clip_val": 0.01},
    "clipped by value": {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "LBFGS": {},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_where_the_hand_written_step_does_the_same_operations_the_weights_are_equal_to_the_last_bit(name: str) -> None:
    shapes = (zoo.ListBatch, SameOperations)
    if name == "LBFGS":
        shapes = (LBFGS, type("SameLBFGS", (SameOperations,), {"configure_optimizers": LBFGS.configure_optimizers}))
    settings = {**SETTINGS[name], "max_epochs": 2, "loader": data()}
    expected = flat(fitted(shapes[1], **settings))
    assert torch.equal(flat(fitted(shapes[0], penalised(), **settings)), expected)
    assert not torch.equal(flat(fitted(shapes[0], **settings)), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("attack", ["madry", "trades", "n-fgsm"])
def test_beside_an_attack_the_order_of_callbacks_means_nothing(attack: str, method: str) -> None:
    def both() -> list[Any]:
        adversary = THREAT if attack == "n-fgsm" else PGD(THREAT, steps=2)
        return [AdversarialTraining(adversary, attack), penalised(method)]

    one, other = fitted(zoo.ListBatch, *both()), fitted(zoo.ListBatch, *reversed(both()))
    assert torch.equal(flat(one), flat(other))
    assert not torch.equal(flat(one), flat(fitted(zoo.ListBatch, both()[0])))
    assert not torch.equal(flat(one), flat(fitted(zoo.ListBatch, both()[1])))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", ["fed", "clean"])
def test_the_penalty_stands_at_the_attacked_batch_or_at_the_clean_one(at: str, method: str) -> None:
    attacked: list[Tensor] = []

    class Keeping(AdversarialTraining):
        def on_train_batch_end(self, *_: Any) -> None:
            attacked.append(self._perturbed().clone())

    before = zoo.built(NoDropout)
    adversary = Keeping(PGD(ThreatModel("linf", 0.3), steps=3))
    after = fitted(NoDropout, adversary, penalised(method, at=at), max_steps=1)
    (adversarial,), (x, y) = attacked, zoo.ListBatch.batch(16)
    penalties = {
        place: squares(lambda z: F.cross_entropy(before.net(z), y, reduction="none"), inputs, method).mean()
        for place, inputs in {"fed": adversarial, "clean": x}.items()
    }
    assert float(penalties["fed"].detach()) != pytest.approx(float(penalties["clean"].detach()), rel=0.05)
    loss = F.cross_entropy(before.net(adversarial), y) + WEIGHT * penalties[at]
    parameters = dict(before.named_parameters())
    for (name, old), gradient in zip(
        parameters.items(), torch.autograd.grad(loss, list(parameters.values())), strict=True
    ):
        torch.testing.assert_close(old - after.get_parameter(name), gradient, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize(("method", "at"), list(itertools.product(METHODS, ["fed", "clean"])))
def test_a_weight_of_zero_changes_nothing_buffers_and_random_streams_included(method: str, at: str) -> None:
    for shape in (zoo.SharedStepWithMetrics, zoo.SideEffects, zoo.NumpyMixup):
        weightless = SaliencyRegularization(InputGradientPenalty(method), 0.0, at=at)
        assert torch.equal(flat(fitted(shape, weightless)), flat(fitted(shape)))


@pytest.mark.parametrize("method", METHODS)
def test_running_statistics_are_moved_by_the_forward_of_the_step_alone(method: str) -> None:
    plain, regularised = fitted(zoo.ListBatch, max_steps=1), fitted(zoo.ListBatch, penalised(method), max_steps=1)
    for (name, buffer), (_, other) in zip(plain.named_buffers(), regularised.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name
    assert not torch.equal(plain.net[0].weight, regularised.net[0].weight)
    assert int(fitted(zoo.ListBatch, penalised(method)).net[1].num_batches_tracked) == 3


def test_several_penalties_share_one_step_in_any_order() -> None:
    mask = (torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.3).float()

    class Masked(zoo.ListBatch):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y, _ = batch
            return F.cross_entropy(self(x), y)

    def callbacks() -> list[Any]:
        return [
            penalised("double_backward"),
            SaliencyRegularization(RightReasons(2), 3.0),
            SaliencyRegularization(InputGradientPenalty(step=0.05), 0.3, name="second"),
            AdversarialTraining(PGD(THREAT, steps=1)),
        ]

    first, *others = (
        flat(fitted(Masked, *order, loader=data(48, mask))) for order in list(itertools.permutations(callbacks()))[::5]
    )
    assert len(others) == 4
    for other in others:  # not to the last bit: three terms are added in another order
        torch.testing.assert_close(other, first, rtol=1e-5, atol=1e-6)


# -- forwards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "at", "each", "first"),
    [
        ("finite_differences", "fed", 2, 3),
        ("double_backward", "fed", 1, 2),
        ("finite_differences", "clean", 2, 3),
        ("double_backward", "clean", 1, 2),
    ],
)
def test_a_step_costs_one_more_forward_or_none(method: str, at: str, each: int, first: int) -> None:
    """Before the first step there are more: one to find the input, and the penalty once on forwards of its own."""
    calls: list[int] = []
    module = zoo.built(zoo.ListBatch)
    module.net.register_forward_hook(lambda *_: calls.append(1))
    seen: list[int] = []

    class Counting(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(len(calls))

    zoo.trainer(callbacks=[penalised(method, at=at), Counting()]).fit(module, data(64))
    assert [b - a for a, b in itertools.pairwise(seen)] == [each] * 3
    assert seen[0] == each + first


@pytest.mark.parametrize(("method", "more"), [("finite_differences", 2), ("double_backward", 1)])
def test_at_the_clean_batch_beside_an_attack_there_is_one_more(method: str, more: int) -> None:
    counts = {}
    for at in ("fed", "clean"):
        calls: list[int] = []
        module = zoo.built(zoo.ListBatch)
        module.net.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        callbacks = [penalised(method, at=at), AdversarialTraining(PGD(THREAT, steps=2))]
        trainer = zoo.trainer(callbacks=callbacks)
        trainer.fit(module, data(16))
        first = len(calls)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, data(16))
        counts[at] = len(calls) - first
    assert counts["clean"] - counts["fed"] == 1


# -- masks -----------------------------------------------------------------------------------------------------------


class Dict(Triple):
    @staticmethod
    def batch(n: int) -> Any:
        return dict(zip(("image", "label", "mask"), Triple.batch(n), strict=True))

    @staticmethod
    def image(batch: Any) -> Tensor:
        return batch["image"]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch["image"]), batch["label"])

    def by_hand(self, batch: Any, x: Tensor) -> Any:
        return super().by_hand(list(batch.values()), x)


def reasons_by_hand(shape: type[Any], method: str) -> type[Any]:
    class Written(shape):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            state = torch.get_rng_state()
            loss = super().training_step(batch, batch_idx)
            end, buffers = torch.get_rng_state(), [b.clone() for b in self.buffers()]

            def scalar(x: Tensor) -> Tensor:
                torch.set_rng_state(state)
                return self.by_hand(batch, x)[2]

            x = self.image(batch)
            mask = self.by_hand(batch, x)[3].expand_as(x)
            square = squares(scalar, x, method, mask)[1:] / mask.flatten(1).sum(1)[1:]  # the first one has no marks
            torch.set_rng_state(end)
            for buffer, before in zip(self.buffers(), buffers, strict=True):
                buffer.data.copy_(before)
            return loss + 2.0 * square.sum() / len(x)

    return Written


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("shape", "key"), [(Triple, 2), (Dict, "mask")])
def test_right_reasons_find_their_masks_in_the_batch(shape: type[Any], key: Any, method: str) -> None:
    expected = flat(fitted(reasons_by_hand(shape, method)))
    found = flat(fitted(shape, SaliencyRegularization(RightReasons(key, method), 2.0)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert float((flat(fitted(shape)) - expected).abs().max()) > 1e-4


def test_a_missing_mask_is_an_error_that_lists_the_batch() -> None:
    trainer = zoo.trainer(callbacks=[SaliencyRegularization(RightReasons("masks"))])
    with pytest.raises(KeyError, match=r"batch\['masks'\]; it has batch\['image'\], batch\['label'\], batch\['mask'\]"):
        trainer.fit(zoo.built(Dict), zoo.loader(Dict))
    assert trainer.global_step == 0


def test_a_mask_that_is_none_is_told_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"expects masks, a tensor, at batch\['mask'\], got NoneType; .* holds zeros"):
        fitted(zoo.DictBatchWithExtras, SaliencyRegularization(RightReasons("mask")))


# -- what cannot be trained ------------------------------------------------------------------------------------------


def test_attributions_of_captum_are_refused() -> None:
    net = zoo.network()
    for penalty in (captum.attr.Saliency(net), captum.attr.IntegratedGradients(net).attribute, captum.attr.Saliency):
        with pytest.raises(TypeError, match="captum is not differentiable with respect to parameters"):
            SaliencyRegularization(penalty)
    with pytest.raises(TypeError, match="must be a callable"):
        SaliencyRegularization(0.1)
    with pytest.raises(TypeError, match=r"must be a callable.*InputGradientPenalty"):
        SaliencyRegularization(InputGradientPenalty)  # the class, not one of its kind

    def wrapped(logits_fn: Any, x: Tensor, y: Tensor, **_: Any) -> Tensor:
        return captum.attr.Saliency(logits_fn).attribute(x.detach().clone().requires_grad_(), y).square().mean()

    trainer = zoo.trainer(callbacks=[SaliencyRegularization(wrapped)])
    with pytest.raises(RuntimeError, match=r"SaliencyRegularization\(wrapped\) reaches 0 of 6 trainable parameters"):
        trainer.fit(zoo.built(zoo.ListBatch), data())
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"weight": -1}, "must not be negative"),
        ({"warmup_epochs": -1}, "must not be negative"),
        ({"weight": "some"}, "a number, 'auto', or numbers by epoch"),
        ({"weight": {}}, "a number, 'auto', or numbers by epoch"),
        ({"weight": {0: 0.1, 3: -1}}, "must not be negative"),
        ({"weight": float("inf")}, "finite"),
        ({"at": "attacked"}, "'fed' or 'clean'"),
        ({"logits_fn": len}, "target_key"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SaliencyRegularization(InputGradientPenalty(), **settings)


def test_attention_trains_by_finite_differences_and_says_no_to_double_backward_before_training() -> None:
    trainer = zoo.trainer(callbacks=[penalised("double_backward")])
    with pytest.raises(RuntimeError, match=r"no second derivative.*SDPBackend\.MATH.*finite_differences"):
        trainer.fit(zoo.built(Attention), data())
    assert trainer.global_step == 0
    expected = flat(fitted(written_by_hand(Attention, "finite_differences")))
    torch.testing.assert_close(flat(fitted(Attention, penalised())), expected, rtol=1e-5, atol=1e-6)


# Dynamo's own, about the copy of the input that the step is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("how", ["wrapped", "in place", "function"])
@pytest.mark.parametrize("attacked", [False, True])
def test_a_compiled_network_trains_by_finite_differences_alone(attacked: bool, how: str) -> None:
    def attack() -> list[Any]:
        return [AdversarialTraining(PGD(THREAT, steps=2))] if attacked else []

    module = compiled(how)
    zoo.trainer(callbacks=[*attack(), penalised()]).fit(module, data())
    expected = fitted(NoDropout, *attack(), penalised(), loader=data())
    torch.testing.assert_close(flat(module), flat(expected), rtol=1e-4, atol=1e-5)
    trainer = zoo.trainer(callbacks=[penalised("double_backward"), *attack()])
    with pytest.raises(RuntimeError, match=r"compiled network.*finite_differences"):
        trainer.fit(compiled(how), data())
    assert trainer.global_step == 0


# -- nothing left ----------------------------------------------------------------------------------------------------


def attributes(module: nn.Module) -> dict[str, list[str]]:
    ours = ("training_step", "on_save_checkpoint", "log", "log_dict", "manual_backward", "_lightning_robust_seam")
    return {
        name: [a for a in ours if a in vars(part)] + [str(h) for h in part._forward_hooks]
        for name, part in module.named_modules()
    }


def test_a_module_is_as_before_after_a_fit_and_after_a_crash() -> None:
    class Failing(zoo.ListBatch):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.fails and batch_idx == 1:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    module = zoo.built(Failing)
    before = attributes(module)
    for fails in (False, True):
        module.fails, callback = fails, penalised()
        trainer = zoo.trainer(callbacks=[callback, AdversarialTraining(PGD(THREAT, steps=1))])
        if fails:
            with pytest.raises(ZeroDivisionError):
                trainer.fit(module, data())
        else:
            trainer.fit(module, data())
        assert attributes(module) == before
        assert callback._trainer is None
        assert all(p.grad is None or not p.grad.requires_grad for p in module.parameters())


def test_one_callback_serves_a_second_module_and_a_second_fit() -> None:
    callback = penalised()
    fitted(zoo.DictBatchWithExtras, callback)
    assert torch.equal(flat(fitted(zoo.ListBatch, callback)), flat(fitted(zoo.ListBatch, penalised())))


def test_a_resumed_run_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    def run(epochs: int, path: Any = None) -> Any:
        module = zoo.built(NoDropout)
        callbacks = [SaliencyRegularization(InputGradientPenalty(), 0.5, warmup_epochs=3)]
        trainer = zoo.trainer(max_epochs=epochs, callbacks=callbacks)
        trainer.fit(module, data(), ckpt_path=path)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    whole = flat(run(4))
    run(2)
    assert torch.equal(flat(run(4, tmp_path / "2.ckpt")), whole)


def test_hyper_parameters_in_a_checkpoint_are_those_of_the_module(tmp_path: Path) -> None:
    class WithHyperparameters(zoo.ListBatch):
        def __init__(self, lr: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters()

    saved = {}
    for name, callbacks in {"without": [], "with": [penalised()]}.items():
        trainer = zoo.trainer(callbacks=callbacks)
        trainer.fit(zoo.built(WithHyperparameters), data())
        trainer.save_checkpoint(tmp_path / name)
        saved[name] = torch.load(tmp_path / name, weights_only=True)
    assert saved["with"]["hyper_parameters"] == saved["without"]["hyper_parameters"] == {"lr": 0.1}
    assert set(saved["with"]) - set(saved["without"]) == {"lightning_robust"}
    loaded = WithHyperparameters.load_from_checkpoint(tmp_path / "with")
    assert loaded.hparams.lr == 0.1


def test_two_callbacks_on_one_key_are_refused_and_of_two_kinds_they_are_not() -> None:
    with pytest.raises(ValueError, match="name="):
        fitted(Triple, penalised(), penalised("double_backward"))
    fitted(Triple, penalised(), SaliencyRegularization(RightReasons(2)))


def test_two_processes_keep_one_set_of_weights_equal_to_a_hand_computation(tmp_path: Path) -> None:
    script, result = Path(__file__).parent / "two_processes_saliency.py", tmp_path / "result.json"
    subprocess.run([sys.executable, script, "penalty", result], check=True, timeout=240, capture_output=True)
    distances = json.loads(result.read_text())
    assert set(distances) == {"finite_differences", "double_backward", "madry", "jacobian", "all"}
    assert all(row["between processes"] == 0 for row in distances.values())
    assert all(row["to plain"] > 1e-3 for row in distances.values())
    for method in (*METHODS, "jacobian"):
        assert distances[method]["to one process"] < 1e-6
    assert distances["jacobian"]["weights"] < 1e-5
