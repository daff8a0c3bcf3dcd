"""One tensor for attacks and penalties, wherever in the batch the input comes from."""

from __future__ import annotations

import pytest
import torch
import zoo

from lightning_robust.attach.inputs import Inputs

BATCH = {"left": zoo.images(3), "right": torch.rand(3, 5, dtype=torch.float64), "byte": torch.arange(12).view(3, 4)}


def test_one_float_leaf_is_itself_there_and_back() -> None:
    inputs = Inputs((("left",),))
    assert inputs.of(BATCH) is BATCH["left"]
    assert inputs.into(BATCH, BATCH["left"]) == {("left",): BATCH["left"]}


def test_integers_are_seen_as_floats_only_where_that_was_found_out() -> None:
    assert Inputs((("byte",),), cast=True).of(BATCH).dtype == torch.float32
    assert Inputs((("byte",),)).of(BATCH) is BATCH["byte"]


def test_several_inputs_lie_side_by_side_and_come_back_as_they_were() -> None:
    inputs = Inputs((("left",), ("right",), ("byte",)), cast=True)
    x = inputs.of(BATCH)
    assert x.shape == (3, 64 + 5 + 4)
    back = inputs.into(BATCH, x)
    for key in ("left", "right"):
        assert back[key,].dtype == BATCH[key].dtype
        assert torch.equal(back[key,], BATCH[key])
    assert torch.equal(back["byte",], BATCH["byte"].float())
    assert inputs.into(BATCH, x[:2])["left",].shape == (2, 1, 8, 8)


def test_inputs_with_other_numbers_of_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows differ: batch\['a'\] 2, batch\['b'\] 3"):
        Inputs((("a",), ("b",))).of({"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)})


def test_a_leaf_of_the_packed_graph_gets_the_gradient_of_every_part() -> None:
    inputs = Inputs((("left",), ("right",)))
    leaf = inputs.of(BATCH).detach().requires_grad_()
    parts = inputs.into(BATCH, leaf)
    (2 * parts["left",].sum() + 3 * parts["right",].sum()).backward()
    assert torch.equal(leaf.grad[:, :64], torch.full((3, 64), 2.0, dtype=torch.float64))
    assert torch.equal(leaf.grad[:, 64:], torch.full((3, 5), 3.0, dtype=torch.float64))
