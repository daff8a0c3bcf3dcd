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
    fitted,
    flat,
    penalised,
    squares,
)
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust import PGD, AdversarialTraining, InputGradientPenalty, RightReasons, SaliencyRegularization
from lightning_robust.penalties import AttributionPrior, JacobianPenalty, SaliencyConsistency, SaliencyGuided
from lightning_robust.randomness import seeded

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


def first_loss_and_term(penalty: Any) -> tuple[float, float]:
    module = zoo.built(NoDropout)
    x, y = zoo.ListBatch.batch(16)
    draws = {} if isinstance(penalty, InputGradientPenalty) else {"generator": seeded(0, 0, 0, 0)}
    term = penalty(module.net, x, y, **draws)
    return float(F.cross_entropy(zoo.built(NoDropout).net(x), y).detach()), float(term.detach())


@pytest.mark.parametrize("penalty", [InputGradientPenalty("double_backward"), JacobianPenalty(), AttributionPrior()])
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
    automatic = SaliencyRegularization(InputGradientPenalty(), "auto")
    loss, term = first_loss_and_term(InputGradientPenalty())
    by_number = SaliencyRegularization(InputGradientPenalty(), loss / term)
    settings = {"loader": data(), "max_epochs": 2}
    torch.testing.assert_close(
        flat(fitted(NoDropout, automatic, **settings)), flat(fitted(NoDropout, by_number, **settings))
    )


@pytest.mark.parametrize("beside", [False, True])
def test_an_automatic_weight_at_the_clean_batch_is_measured_against_its_loss(beside: bool) -> None:
    loss, term = first_loss_and_term(InputGradientPenalty())
    callback = SaliencyRegularization(InputGradientPenalty(), "auto", at="clean")
    fitted(NoDropout, callback, *([AdversarialTraining(PGD(THREAT, steps=2))] if beside else []), max_steps=1)
    assert callback.weight.measured == pytest.approx(loss / term, rel=1e-4)


def test_a_resumed_run_keeps_an_automatic_weight(tmp_path: Path) -> None:
    def run(epochs: int, path: Any = None) -> tuple[Tensor, Any]:
        callback = SaliencyRegularization(InputGradientPenalty(), "auto")
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
    callback = SaliencyRegularization(InputGradientPenalty(), "auto")
    fitted(zoo.DictBatchWithExtras, callback)
    first = callback.weight.measured
    again = fitted(NoDropout, callback)
    fresh = SaliencyRegularization(InputGradientPenalty(), "auto")
    assert torch.equal(flat(again), flat(fitted(NoDropout, fresh)))
    assert callback.weight.measured == fresh.weight.measured != first


def test_where_there_is_nothing_to_measure_an_automatic_weight_waits_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = Said(monkeypatch)
    mask = torch.zeros(64, 1, 8, 8)
    mask[40:] = 1  # from the third batch on
    callback = SaliencyRegularization(RightReasons(2), "auto")
    module = fitted(Triple, callback, loader=data(64, mask))
    assert (callback.weight.measured or 0) > 0
    assert sum("stays 0" in line for line in said.lines) == 1
    assert sum("auto' is" in line for line in said.lines) == 1
    assert bool(flat(module).isfinite().all())


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
