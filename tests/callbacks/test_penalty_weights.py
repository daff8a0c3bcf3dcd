"""What a penalty is multiplied by: a number, a line over the epochs, or what the first step measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from callbacks.penalised_runs import (
    THREAT,
    WEIGHT,
    NoDropout,
    Smooth,
    Triple,
    built_from_recipe,
    data,
    drawing,
    fitted,
    flat,
    penalised,
    squares,
)
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import PGD, AdversarialTraining, InputGradientPenalty, RightReasons, SaliencyRegularization
from lightning_robust.demo import Classifier, DecoyDigits
from lightning_robust.penalties import AttributionPrior, JacobianPenalty, SaliencyConsistency, SaliencyGuided

# -- numbers and lines -----------------------------------------------------------------------------------------------


class Line(zoo.Shape):
    """One weight, a loss that leaves it alone, and plain gradient descent with rate 1."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 10, bias=False)
        nn.init.zeros_(self.net.weight)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return 0.0 * F.cross_entropy(self.net(x.flatten(1)), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_a_users_function_is_a_penalty_and_the_weight_grows_in_every_step() -> None:
    weights: list[float] = []

    def logit_sum(logits_fn: Any, x: Tensor, y: Tensor, **_: Any) -> Tensor:
        # Its gradient is 1 in each of the ten rows, whatever the weights are.
        return logits_fn(torch.ones_like(x) / 64).sum() / len(x)

    class Watching(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            weights.append(float(pl_module.net.weight.detach().mean()) * -64)

    module = zoo.built(Line)
    trainer = zoo.trainer(
        max_epochs=3, callbacks=[SaliencyRegularization(logit_sum, 0.8, warmup_epochs=2), Watching()], logger=False
    )
    trainer.fit(module, zoo.loader(Line))
    # Two batches an epoch: a quarter of the weight, two quarters, three, and then all of it.
    assert weights == pytest.approx([0.2, 0.6, 1.2, 2.0, 2.8, 3.6], rel=1e-5)
    assert float(trainer.callback_metrics["robust/train/logit_sum_weight"]) == pytest.approx(0.8)


def test_a_weight_may_run_in_straight_lines_over_the_epochs() -> None:
    weights: list[float] = []

    class Watching(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            weights.append(float(pl_module.net.weight.detach().mean()) * -64)

    def logit_sum(logits_fn: Any, x: Tensor, y: Tensor) -> Tensor:
        return logits_fn(torch.ones_like(x) / 64).sum() / len(x)

    callback = SaliencyRegularization(logit_sum, {1: 0.2, 2: 1.0}, warmup_epochs=2)
    trainer = zoo.trainer(max_epochs=3, callbacks=[callback, Watching()], logger=False)
    trainer.fit(zoo.built(Line), zoo.loader(Line))
    assert float(trainer.callback_metrics["robust/train/logit_sum_weight"]) == pytest.approx(1.0)
    # Two batches an epoch: 0.2 / 4, 0.2 / 2, then 0.6 * 3 / 4, and 1.
    assert weights == pytest.approx([0.05, 0.15, 0.6, 1.6, 2.6, 3.6], rel=1e-5)


# -- automatic weights -----------------------------------------------------------------------------------------------


class Said:
    """What the callbacks say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lines: list[str] = []
        monkeypatch.setattr(SaliencyRegularization, "say", lambda _, __, message: self.lines.append(message))


class Steep(InputGradientPenalty):
    """Measured in the first step, as penalties are that do not start flat."""

    starts_flat, auto_share = False, 1.0


def first_loss_and_term(penalty: Any) -> tuple[float, float]:
    module = zoo.built(NoDropout)
    x, y = zoo.ListBatch.batch(16)
    draws = {} if isinstance(penalty, InputGradientPenalty) else {"generator": drawing(penalty, 0, 0)}
    term = penalty(module.net, x, y, **draws)
    return float(F.cross_entropy(zoo.built(NoDropout).net(x), y).detach()), float(term.detach())


@pytest.mark.parametrize("penalty", [Steep("double_backward"), AttributionPrior()])
def test_an_automatic_weight_makes_the_penalty_as_large_as_the_loss_in_the_first_step(
    penalty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = Said(monkeypatch)
    loss, term = first_loss_and_term(penalty)
    trainer = zoo.trainer(callbacks=[SaliencyRegularization(penalty, "auto")], max_steps=1)
    trainer.fit(zoo.built(NoDropout), zoo.loader(NoDropout))
    logged = {key.split("/")[-1]: float(value) for key, value in trainer.callback_metrics.items()}
    assert logged[penalty.name] == pytest.approx(loss, rel=1e-4)
    assert logged[f"{penalty.name}_weight"] == pytest.approx(loss / term, rel=1e-4)
    assert [line for line in said.lines if f"weight 'auto' is {loss / term:.3g}"[:-1] in line]


def test_an_automatic_weight_stays_what_it_was_in_the_first_step() -> None:
    automatic = SaliencyRegularization(Steep(), "auto")
    loss, term = first_loss_and_term(InputGradientPenalty())
    by_number = SaliencyRegularization(InputGradientPenalty(), loss / term)
    settings = {"loader": data(), "max_epochs": 2}
    torch.testing.assert_close(
        flat(fitted(NoDropout, automatic, **settings)), flat(fitted(NoDropout, by_number, **settings))
    )


@pytest.mark.parametrize("beside", [False, True])
def test_an_automatic_weight_at_the_clean_batch_is_measured_against_its_loss(beside: bool) -> None:
    loss, term = first_loss_and_term(InputGradientPenalty())
    callback = SaliencyRegularization(Steep(), "auto", at="clean")
    fitted(NoDropout, callback, *([AdversarialTraining(PGD(THREAT, steps=2))] if beside else []), max_steps=1)
    assert callback.weight.measured == pytest.approx(loss / term, rel=1e-4)


def test_a_resumed_run_keeps_an_automatic_weight(tmp_path: Path) -> None:
    def run(epochs: int, path: Any = None) -> tuple[Tensor, Any]:
        callback = SaliencyRegularization(Steep(), "auto")
        module, trainer = zoo.built(NoDropout), zoo.trainer(max_epochs=epochs, callbacks=[callback])
        trainer.fit(module, data(), ckpt_path=path)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return flat(module), callback.weight.measured

    whole = run(4)
    assert run(2)[1] == whole[1]
    resumed = run(4, tmp_path / "2.ckpt")
    assert resumed[1] == whole[1]
    assert torch.equal(resumed[0], whole[0])
    stored = torch.load(tmp_path / "4.ckpt", weights_only=True)["lightning_robust"]["penalty_weights"]
    assert stored == {"robust/train/input_gradient": whole[1]}


def test_a_second_run_measures_anew() -> None:
    callback = SaliencyRegularization(Steep(), "auto")
    fitted(zoo.DictBatchWithExtras, callback)
    first = callback.weight.measured
    again = fitted(NoDropout, callback)
    fresh = SaliencyRegularization(Steep(), "auto")
    assert torch.equal(flat(again), flat(fitted(NoDropout, fresh)))
    assert callback.weight.measured == fresh.weight.measured != first


def test_where_there_is_nothing_to_measure_an_automatic_weight_waits_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = Said(monkeypatch)
    seen: list[int] = []

    def late(logits_fn: Any, x: Tensor, y: Tensor) -> Tensor:
        seen.append(len(seen))
        return logits_fn(x).square().mean() * (len(seen) > 3)  # the check, and two batches

    callback = SaliencyRegularization(late, "auto")
    with pytest.warns(UserWarning, match="every gradient of it is exactly 0"):
        module = fitted(NoDropout, callback, loader=data(64))
    assert (callback.weight.measured or 0) > 0
    assert sum("stays 0" in line for line in said.lines) == 1
    assert sum("auto' is" in line for line in said.lines) == 1
    assert bool(flat(module).isfinite().all())


# -- automatic weights of penalties that are next to 0 before training ----------------------------------------------


class Learning(Triple):
    """Learns so fast that predictions are not even after the first epoch, without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = NoDropout().net

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))


def rounds(batches: int, **settings: Any) -> DataLoader[Any]:
    """Images whose label is written into them, in a place that is masked."""
    x, y, mask = zoo.images(16 * batches), zoo.labels(16 * batches), torch.zeros(16 * batches, 1, 8, 8)
    mask[:, :, 0] = 1
    x[torch.arange(len(x)), 0, 0, y % 8] += 3
    return DataLoader(TensorDataset(x, y, mask), 16, **settings)


def test_right_reasons_are_weighed_by_the_means_of_the_first_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    said = Said(monkeypatch)
    pairs: list[tuple[float, float]] = []

    class Keeping(RightReasons):
        def __call__(self, logits_fn: Any, x: Tensor, y: Tensor, *, mask: Tensor, logits: Any = None) -> Tensor:
            found = super().__call__(logits_fn, x, y, mask=mask, logits=logits)
            pairs.append((0.0 if logits is None else float(F.cross_entropy(logits.detach(), y)), float(found.detach())))
            return found

    module, trainer = zoo.built(Learning), zoo.trainer(callbacks=[callback_of(Keeping(2))], max_epochs=2)
    trainer.fit(module, rounds(8))
    (callback,) = (c for c in trainer.callbacks if isinstance(c, SaliencyRegularization))
    losses, terms = zip(*pairs[1:9], strict=True)  # the first one is the check
    assert callback.weight.measured == pytest.approx(sum(losses) / sum(terms), rel=1e-4)
    assert float(trainer.callback_metrics["robust/train/right_reasons_weight"]) == pytest.approx(
        callback.weight.measured
    )
    assert "weight auto (of the first epoch)" in said.lines[0]
    assert said.lines[1].count("weight 'auto' is") == len(said.lines) - 1 == 1


def callback_of(penalty: Any = RightReasons(2)) -> SaliencyRegularization:  # noqa: B008  # frozen
    return SaliencyRegularization(penalty, "auto")


def test_the_first_epoch_is_that_of_a_run_without_it() -> None:
    weights: dict[bool, list[Tensor]] = {True: [], False: []}

    class Keeping(pl.Callback):
        def __init__(self, kept: list[Tensor]) -> None:
            self.kept = kept

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.kept.append(flat(pl_module))

    for given, kept in weights.items():
        fitted(Learning, *([callback_of()] if given else []), Keeping(kept), loader=rounds(4), max_epochs=2)
    assert torch.equal(weights[True][0], weights[False][0])
    assert not torch.allclose(weights[True][1], weights[False][1], atol=1e-4)


def test_a_checkpoint_of_the_first_validation_has_the_weight_and_a_resumed_run_keeps_it(tmp_path: Path) -> None:
    def run(epochs: int, path: Any = None) -> tuple[Tensor, Any]:
        saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
        callback, module = callback_of(), zoo.built(Learning)
        trainer = zoo.trainer(max_epochs=epochs, callbacks=[callback, saving], enable_checkpointing=True)
        trainer.fit(module, rounds(4), rounds(1), ckpt_path=path)
        return flat(module), callback.weight.measured

    whole = run(3)
    stored = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["lightning_robust"]["penalty_weights"]
    assert stored == {"robust/train/right_reasons": whole[1]}
    resumed = run(3, tmp_path / "epoch=0.ckpt")
    assert resumed[1] == whole[1]
    assert torch.equal(resumed[0], whole[0])


def test_a_run_resumed_in_its_first_epoch_measures_what_is_left_of_it(tmp_path: Path) -> None:
    def run(path: Any = None, **limits: Any) -> Any:
        callback = callback_of()
        trainer = zoo.trainer(callbacks=[callback], **limits)
        trainer.fit(zoo.built(Learning), rounds(8), ckpt_path=path)
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        return callback.weight.measured

    whole = run(max_epochs=2)
    assert run(max_epochs=2, max_steps=3) is None
    assert run(tmp_path / "half.ckpt", max_epochs=2) not in (None, whole)


def test_a_head_that_starts_at_0_waits_until_the_model_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    said = Said(monkeypatch)

    class Zero(Learning):
        rate = 1e-4

        def __init__(self) -> None:
            super().__init__()
            nn.init.zeros_(self.net[-1].weight)
            nn.init.zeros_(self.net[-1].bias)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.rate)

    with pytest.warns(UserWarning, match="the last layer starts at 0"):
        module = fitted(Zero, callback := callback_of(), loader=rounds(4), max_epochs=3)
    assert callback.weight.measured is None
    assert sum("predictions are next to even" in line for line in said.lines) == 1
    assert bool(flat(module).isfinite().all())
    with pytest.warns(UserWarning, match="the last layer starts at 0"):
        module = fitted(type("Fast", (Zero,), {"rate": 0.3}), callback := callback_of(), loader=rounds(8), max_epochs=9)
    assert 0 < (callback.weight.measured or 0) < 1e4
    assert bool(flat(module).isfinite().all())


def test_a_run_of_one_epoch_is_told_that_nothing_is_measured_in_time() -> None:
    with pytest.warns(UserWarning, match="with max_epochs=1 the penalty trains nothing"):
        fitted(Triple, callback_of())


@pytest.mark.parametrize("penalty", [InputGradientPenalty(), JacobianPenalty()], ids=lambda p: p.name)
def test_a_net_without_normalisation_learns_under_an_automatic_weight(penalty: Any) -> None:
    """Its gradients are next to nothing before training: the first step would give a weight that ends it."""

    class Plain(zoo.ListBatch):
        def __init__(self) -> None:
            super().__init__()
            layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
            self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 4))

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=3e-3)

    x, y = torch.rand(256, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(256) % 4
    for kind in range(4):
        x[y == kind, :, 4 * (kind // 2) : 4 * (kind // 2) + 4, 4 * (kind % 2) : 4 * (kind % 2) + 4] += 0.5
    module = zoo.built(Plain)
    trainer = zoo.trainer(callbacks=[callback := callback_of(penalty)], max_epochs=12)
    trainer.fit(module, DataLoader(TensorDataset(x, y), 32))
    with torch.no_grad():
        accuracy = (module.eval()(x).argmax(1) == y).float().mean()
    assert (callback.weight.measured or 0) > 0
    assert accuracy > 0.9


def test_right_reasons_with_an_automatic_weight_learn_the_decoys_as_well_as_with_a_good_number() -> None:
    accuracy = {}
    for weight in ("auto", 10.0):
        pl.seed_everything(0, verbose=False)
        module, decoys = Classifier(), DecoyDigits(batch_size=32)
        trainer = zoo.trainer(
            max_epochs=3,
            callbacks=[SaliencyRegularization(RightReasons(2), weight)],
            limit_train_batches=16,
            limit_val_batches=4,
            check_val_every_n_epoch=3,
        )
        trainer.fit(module, decoys)
        accuracy[weight] = float(trainer.callback_metrics["val/accuracy"])
    assert accuracy["auto"] > accuracy[10.0] - 0.1
    assert accuracy["auto"] > 0.6


@pytest.mark.parametrize("penalty", [SaliencyGuided(), SaliencyConsistency()], ids=lambda p: p.name)
def test_penalties_that_are_next_to_nothing_before_training_want_a_number(penalty: Any) -> None:
    with pytest.raises(ValueError, match=rf"first step, where {type(penalty).__name__} is next to 0.*give a number"):
        SaliencyRegularization(penalty, "auto")
    net, (x, y) = zoo.built(Smooth).net, zoo.ListBatch.batch(16)
    loss = F.cross_entropy(net(x), y)
    assert float((loss / penalty(net, x, y)).detach()) > 10  # what would be measured


def test_an_automatic_weight_of_a_negative_penalty_is_an_error() -> None:
    def gain(logits_fn: Any, x: Tensor, y: Tensor) -> Tensor:
        return -logits_fn(x).square().mean()

    with pytest.raises(ValueError, match=r"weight='auto'.* not negative, got -"):
        fitted(NoDropout, SaliencyRegularization(gain, "auto"))


# -- a weight of 0 ---------------------------------------------------------------------------------------------------


def test_at_a_weight_of_0_the_penalty_is_computed_for_the_check_alone_and_logged_as_0() -> None:
    calls: list[int] = []
    tracked: list[bool] = []

    class Looking(NoDropout):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            tracked.append(batch[0].requires_grad)
            return super().training_step(batch, batch_idx)

    def broken(logits_fn: Any, x: Tensor, y: Tensor, logits: Any = None) -> Tensor:
        calls.append(1)
        return logits_fn(x).square().mean() * (1.0 if len(calls) == 1 else torch.nan)

    for weight in (0.0, {0: 0.0, 9: 0.0, 10: 1.0}):
        calls.clear()
        tracked.clear()
        module = zoo.built(Looking)
        trainer = zoo.trainer(max_epochs=2, callbacks=[SaliencyRegularization(broken, weight)])
        trainer.fit(module, data())
        assert len(calls) == 1
        assert not any(tracked[-6:])  # the input's gradient is not computed either
        assert torch.equal(flat(module), flat(fitted(NoDropout, max_epochs=2, loader=data())))
        logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
        assert logged == {"robust/train/broken": 0.0, "robust/train/broken_weight": 0.0}


# -- recipes and log -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "given"),
    [("0.3", 0.3), ("2", 2.0), ("auto", "auto"), ("{0: 0.0, 5: 0.1}", {0.0: 0.0, 5.0: 0.1})],
)
def test_recipes_write_weights_in_every_form(written: str, given: Any, tmp_path: Path) -> None:
    assert built_from_recipe(tmp_path, "lightning_robust.InputGradientPenalty", "{}", written).weight.given == given


def test_it_logs_the_weighted_penalty_and_its_weight() -> None:
    module = zoo.built(NoDropout)
    x, y = zoo.ListBatch.batch(16)
    expected = squares(lambda z: F.cross_entropy(module.net(z), y, reduction="none"), x, "finite_differences").mean()
    trainer = zoo.trainer(callbacks=[penalised(name="mine")], max_steps=1)
    trainer.fit(zoo.built(NoDropout), zoo.loader(NoDropout))
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert logged == pytest.approx(
        {
            "robust.mine/train/input_gradient": WEIGHT * float(expected.detach()),
            "robust.mine/train/input_gradient_weight": WEIGHT,
        },
        rel=1e-5,
    )
