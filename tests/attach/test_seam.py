"""The seam: feed, add, run under; any order; and nothing left, however it ends."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from small_steps import Linear, doubled, ten_w

from lightning_robust.attach.seam import clean_batch, install, leave_weights
from lightning_robust.attach.step import Step


@pytest.mark.parametrize("order", [("feed", "add"), ("add", "feed")])
def test_a_step_is_fed_and_added_to_in_any_order(order: tuple[str, str]) -> None:
    module = Linear()
    for kind in order:
        install(module, kind, **({"feed": doubled} if kind == "feed" else {"add": ten_w}))
    loss = module.training_step([torch.ones(1, 1)], 0)
    (gradient,) = torch.autograd.grad(loss, module.net.weight)
    assert float(gradient) == 2 * 1 + 10  # w * (2 x) + 10 w


def test_what_the_step_returns_keeps_its_type_and_its_own_objects() -> None:
    returned = {"loss": torch.ones((), requires_grad=True), "extra": [1]}

    class Returning(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return returned

    module = Returning()
    install(module, "test", add=ten_w)
    output = module.training_step([torch.ones(1, 1)], 0)
    assert output is not returned
    assert output["extra"] is returned["extra"]
    assert float(returned["loss"].detach()) == 1  # the user's own dict is untouched


def test_the_signature_stays_and_the_last_one_out_puts_the_module_back() -> None:
    module = zoo.NoBatchIdx()
    before = set(vars(module))
    first, second = install(module, "a", feed=lambda step: step.batch), install(module, "b", before=lambda step: None)
    assert list(inspect.signature(module.training_step).parameters) == ["batch"]
    first.detach()
    assert "training_step" in vars(module)
    second.detach()
    second.detach()
    assert set(vars(module)) == before


def test_an_instance_attribute_that_was_there_is_put_back() -> None:
    module = zoo.ListBatch()
    mine = vars(module)["training_step"] = torch.compile(module.training_step, backend="eager")
    handle = install(module, "test", feed=lambda step: step.batch)
    assert vars(module)["training_step"] is not mine
    handle.detach()
    assert vars(module)["training_step"] is mine


def test_a_deep_copy_runs_its_own_weights() -> None:
    module = Linear()
    install(module, "test", feed=doubled)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.net.weight.fill_(3.0)
    assert float(twin.training_step([torch.ones(1, 1)], 0).detach()) == 6.0


@contextmanager
def heavier(step: Step) -> Iterator[None]:
    """Other weights for one step: swap the data, put the very same storage back."""
    weight = step.module.net.weight
    kept = weight.data
    weight.data = kept + 5
    try:
        yield
    finally:
        weight.data = kept


def test_a_step_runs_under_other_weights_until_its_backward_pass_is_over() -> None:
    module = Linear()
    storage, before = module.net.weight.data_ptr(), module.net.weight.detach().clone()
    install(module, "test", under=heavier)
    loss = module.training_step([torch.ones(1, 1)], 0)
    assert float(loss.detach()) == pytest.approx(float(before) + 5)
    loss.backward()
    leave_weights(module)
    assert module.net.weight.data_ptr() == storage
    assert torch.equal(module.net.weight, before)


def test_other_weights_are_left_when_the_step_fails_or_is_skipped() -> None:
    class Failing(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx:
                raise ZeroDivisionError

    module = Failing()
    storage = module.net.weight.data_ptr()
    install(module, "test", under=heavier)
    assert module.training_step([torch.ones(1, 1)], 0) is None
    assert module.net.weight.data_ptr() == storage
    with pytest.raises(ZeroDivisionError):
        module.training_step([torch.ones(1, 1)], 1)
    assert module.net.weight.data_ptr() == storage


class Heavier(pl.Callback):
    """The life of a weight perturbation in a real run."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.handle = install(pl_module, "Heavier", under=heavier)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        leave_weights(pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.handle.detach()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_those_of_the_other_weights_and_the_optimizer_moves_the_real_ones(accumulate: int) -> None:
    class Square(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net.weight.square().sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Square()
    with torch.no_grad():
        module.net.weight.fill_(1.0)
    trainer = zoo.trainer(max_steps=1, accumulate_grad_batches=accumulate, callbacks=[Heavier()])
    trainer.fit(module, zoo.loader(zoo.ListBatch))
    assert float(module.net.weight.detach()) == pytest.approx(1.0 - 0.1 * 2 * (1.0 + 5.0))


def plus_one(step: Step) -> Any:
    return [step.batch[0] + 1]


def refused(step: Step) -> Any:
    raise AssertionError("nobody asked for this")


@pytest.mark.parametrize("first", [True, False])
def test_who_changes_the_data_is_no_adversary_and_comes_before_the_one_there_is(first: bool) -> None:
    module = Linear()
    for change in (True, False) if first else (False, True):
        install(
            module, "data" if change else "attack", feed=plus_one if change else doubled, adversary=not change and None
        )
    loss = module.training_step([torch.ones(1, 1)], 0)
    assert float(loss.detach()) == pytest.approx(4 * float(module.net.weight.detach()))  # (1 + 1) * 2, not 1 * 2 + 1


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_those_who_change_the_data_do_so_in_the_order_of_their_names(names: tuple[str, str]) -> None:
    module = Linear()
    for name in names:
        install(module, name, feed=plus_one if name == "a" else doubled, adversary=False)
    loss = module.training_step([torch.ones(1, 1)], 0)
    assert float(loss.detach()) == pytest.approx(4 * float(module.net.weight.detach()))


def test_two_adversaries_are_one_too_many_however_they_attack() -> None:
    module = Linear()
    install(module, "data", feed=plus_one, adversary=False)
    install(module, "first", feed=doubled)
    install(module, "more data", feed=plus_one, adversary=False)
    for settings in ({"feed": doubled}, {"before": refused, "adversary": True}):
        with pytest.raises(RuntimeError, match="second and first both want to attack"):
            install(module, "second", **settings)


@pytest.mark.parametrize("at", ["fed", "clean"])
def test_the_clean_batch_is_the_one_that_was_changed_and_not_yet_attacked(at: str) -> None:
    seen: list[tuple[float, Any]] = []

    def look(step: Step, call: Any, state: Any) -> dict[str, torch.Tensor]:
        clean = clean_batch(step.module, step.batch)
        seen.append((float(step.batch[0]), clean and float(clean[0])))
        return {}

    module = Linear()
    install(module, "penalty", add=look, at=at)
    install(module, "attack", feed=doubled)
    install(module, "data", feed=plus_one, adversary=False)
    module.training_step([torch.ones(1, 1)], 0)
    assert seen == ([(4.0, 2.0)] if at == "fed" else [(2.0, None)])


def test_without_an_attack_or_outside_of_a_step_there_is_no_other_batch() -> None:
    seen: list[Any] = []

    def look(step: Step, call: Any, state: Any) -> dict[str, torch.Tensor]:
        seen.append(clean_batch(step.module, step.batch))
        return {}

    module = Linear()
    install(module, "penalty", add=look)
    install(module, "data", feed=plus_one, adversary=False)
    module.training_step([torch.ones(1, 1)], 0)
    assert seen == [None]
    assert clean_batch(module, [torch.ones(1, 1)]) is None
    assert clean_batch(Linear(), [torch.ones(1, 1)]) is None
