"""One batch, read any number of times."""

from __future__ import annotations

import pytest
import torch
import zoo

from lightning_robust.attach.batches import copied
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import ProbeError


def step_of(shape: type[zoo.Shape]) -> Step:
    return Step.of(zoo.standalone(shape).eval(), "training_step", shape.batch(8), 0)


def test_every_read_of_a_random_step_is_the_same_and_the_streams_go_on_outside() -> None:
    with Probe().reading(step_of(zoo.NumpyMixup)) as reading:
        first, drawn = reading.read(reading.x), torch.rand(())
        second, drawn_again = reading.read(reading.x), torch.rand(())
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.target, second.target)
    assert drawn != drawn_again


def test_a_target_that_is_a_leaf_needs_no_forward() -> None:
    step = step_of(zoo.ListBatch)
    probe = Probe()
    probe.discover(step)
    runs: list[int] = []
    step.module.net.register_forward_hook(lambda *_: runs.append(1))
    with probe.reading(step) as reading:
        assert reading.y is step.batch[1]
        assert runs == []
    with probe.reading(step) as reading, pytest.raises(ProbeError, match="before any logits"):
        reading.margin(torch.zeros(8, 10), step.batch[1])


def test_a_target_that_the_step_makes_is_read_once() -> None:
    with Probe().reading(step_of(zoo.OneLogitBinary)) as reading:
        assert reading.y.shape == (8, 1)
        assert reading.y is reading.y
        assert "targets batch[1] (cast), binary_cross_entropy_with_logits from 'net'" in reading.found
    with Probe().reading(step_of(zoo.NumpyMixup)) as reading:
        assert reading.y.shape == (8, 10)
        assert "targets made by the step" in reading.found


def test_another_number_of_inputs_travels_in_a_resized_template() -> None:
    step = step_of(zoo.DictBatchWithExtras)
    with Probe().reading(step) as reading, torch.no_grad():
        few, many = reading.logits(zoo.images(3)), reading.logits(zoo.images(19))
    expected = step.module.net.eval()(zoo.images(19))
    assert torch.allclose(many, expected, atol=1e-6)
    assert few.shape == (3, 10)


def test_the_fed_batch_is_new_and_the_rest_of_it_is_not() -> None:
    step = step_of(zoo.DictBatchWithExtras)
    with Probe().reading(step) as reading:
        fed = reading.batch_with(reading.x + 1)
    assert fed is not step.batch
    assert fed["label"] is step.batch["label"]
    assert torch.equal(fed["image"], step.batch["image"] + 1)


def test_only_tensors_are_copied() -> None:
    x, name = torch.zeros(2), object()
    assert copied(x) is not x
    assert copied(name) is name
