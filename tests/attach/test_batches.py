"""Batches of any make: found, replaced, rebuilt; the original is never written to."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_robust.attach.batches import as_path, copied, described, get, leaves, rebuilt, resized, selected, shown

Pair = namedtuple("Pair", "image label")


@dataclass(frozen=True)
class Frozen:
    image: Any
    label: Any


def made(kind: str, image: Any, label: Any) -> Any:
    return {
        "list": [image, label],
        "tuple": (image, label),
        "dict": {"image": image, "label": label},
        "ordered": OrderedDict(image=image, label=label),
        "defaultdict": defaultdict(list, image=image, label=label),
        "read-only mapping": MappingProxyType({"image": image, "label": label}),
        "named tuple": Pair(image, label),
        "frozen dataclass": Frozen(image, label),
        "plain object": SimpleNamespace(image=image, label=label),
        "nested": {"views": [(image, "a name")], "label": label, "nothing": None},
    }[kind]


KINDS = [
    "list",
    "tuple",
    "dict",
    "ordered",
    "defaultdict",
    "read-only mapping",
    "named tuple",
    "frozen dataclass",
    "plain object",
    "nested",
]


@pytest.mark.parametrize("kind", KINDS)
def test_one_leaf_is_replaced_in_a_new_batch_of_the_same_make(kind: str) -> None:
    image, label, other = torch.zeros(2), torch.ones(2), torch.full((2,), 7.0)
    batch = made(kind, image, label)
    path = next(path for path, leaf in leaves(batch) if leaf is image)
    fresh = rebuilt(batch, {path: other})
    assert type(fresh) is type(batch)
    assert get(fresh, path) is other
    assert get(batch, path) is image
    assert [leaf for p, leaf in leaves(fresh) if p != path][-1] is [leaf for p, leaf in leaves(batch) if p != path][-1]
    assert fresh is not batch


def test_writing_into_the_new_containers_leaves_the_old_ones_alone() -> None:
    batch = {"views": [1, 2], "label": 3}
    fresh = rebuilt(batch, {})
    fresh["views"].append(4)
    del fresh["label"]
    assert batch == {"views": [1, 2], "label": 3}


def test_a_named_tuple_is_addressed_by_name_and_by_position() -> None:
    batch = Pair(1, 2)
    assert get(batch, ("label",)) == get(batch, (1,)) == get(batch, (-1,)) == 2


def test_a_bare_tensor_is_a_batch_with_one_leaf() -> None:
    x = torch.zeros(3)
    assert list(leaves(x)) == [((), x)]
    assert rebuilt(x, {(): 5}) == 5
    assert shown(()) == "batch"


def test_what_is_not_there_is_an_error_that_lists_what_is() -> None:
    with pytest.raises(KeyError, match=r"nothing at batch\['x'\]; it has batch\['image'\], batch\['label'\]"):
        get({"image": 1, "label": 2}, ("x",))


def test_keys_are_single_or_a_way_inwards() -> None:
    assert as_path("image") == ("image",)
    assert as_path(0) == (0,)
    assert as_path(("a", 1)) == ("a", 1)


def test_a_description_has_types_and_shapes_and_an_end() -> None:
    assert described([torch.zeros(2, 3), "x", None]) == "batch[0] float32 (2, 3), batch[1] str, batch[2] NoneType"
    assert described({str(i): i for i in range(20)}).endswith("and 8 more")
    assert described([]) == "an empty batch"


def test_an_object_that_is_inside_of_itself_is_a_leaf_there() -> None:
    batch = SimpleNamespace(image=1)
    batch.parent = batch
    assert [path for path, _ in leaves(batch)] == [("image",), ("parent",)]
    fresh = rebuilt(batch, {("image",): 2})
    assert (fresh.image, fresh.parent, batch.image) == (2, batch, 1)


@pytest.mark.parametrize("wanted", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_three_becomes_one_of_any_number_by_repeating_its_samples(kind: str, wanted: int) -> None:
    image, label = torch.arange(12).view(3, 4), torch.tensor([5, 6, 7])
    batch = made(kind, image, label)
    fresh = resized(batch, 3, wanted)
    order = [i % 3 for i in range(wanted)]
    paths = [path for path, leaf in leaves(batch) if isinstance(leaf, torch.Tensor)]
    assert [get(fresh, path).tolist() for path in paths] == [get(batch, path)[order].tolist() for path in paths]
    assert type(fresh) is type(batch)
    assert [leaf for _, leaf in leaves(fresh) if isinstance(leaf, str)] == ["a name"] * (kind == "nested")
    assert image.shape == (3, 4)


def test_lists_with_an_entry_a_sample_follow_and_everything_else_stays() -> None:
    Size = namedtuple("Size", "height width channels")
    batch = {
        "x": torch.arange(3),
        "name": ["a", "b", "c"],
        "id": (1, 2, None),
        "mean": torch.tensor(0.5),
        "weights": torch.ones(5),
        "size": Size(8, 8, 1),
        "two": ["p", "q"],
        "views": [torch.arange(3), torch.arange(3) + 10, torch.arange(3) + 20],
        "flag": True,
    }
    fresh = resized(batch, 3, 4)
    assert (fresh["name"], fresh["id"]) == (["a", "b", "c", "a"], (1, 2, None, 1))
    assert [view.tolist() for view in fresh["views"]] == [[0, 1, 2, 0], [10, 11, 12, 10], [20, 21, 22, 20]]
    assert all(fresh[key] is batch[key] for key in ("mean", "weights", "flag"))
    assert (fresh["size"], fresh["two"]) == (batch["size"], batch["two"])


def test_views_are_tensors_also_where_there_are_as_many_as_samples_wanted() -> None:
    batch = {"views": [torch.arange(2)] * 4}
    assert [len(view) for view in resized(batch, 2, 4)["views"]] == [4, 4, 4, 4]


def test_a_bare_tensor_and_a_list_of_two_tensors_are_resized() -> None:
    assert resized(torch.arange(3), 3, 5).tolist() == [0, 1, 2, 0, 1]
    assert [len(leaf) for leaf in resized([torch.zeros(2), torch.zeros(2)], 2, 5)] == [5, 5]


def test_a_copy_shares_no_memory_and_what_is_no_tensor_is_not_copied() -> None:
    tensor, other = torch.zeros(2), object()
    assert copied(tensor).data_ptr() != tensor.data_ptr()
    assert copied(other) is other
    with torch.inference_mode():
        inference = torch.zeros(2)
    assert not copied(inference).is_inference()


@pytest.mark.parametrize("rows", [[0], [2, 0], [1, 1, 1], [2, 1, 0, 2], []])
@pytest.mark.parametrize("kind", KINDS)
def test_some_samples_of_a_batch_in_any_order_in_a_batch_of_the_same_make(kind: str, rows: list[int]) -> None:
    image, label = torch.arange(12).view(3, 4), torch.tensor([5, 6, 7])
    batch = made(kind, image, label)
    fresh = selected(batch, 3, rows)
    paths = [path for path, leaf in leaves(batch) if isinstance(leaf, torch.Tensor)]
    assert [get(fresh, path).tolist() for path in paths] == [get(batch, path)[rows].tolist() for path in paths]
    assert type(fresh) is type(batch)
    assert (image.shape, label.tolist()) == ((3, 4), [5, 6, 7])
    with torch.no_grad():
        for path in paths:
            get(fresh, path).add_(100)
    assert (int(image.max()), int(label.max())) == (11, 7)  # a copy, not a view


def test_of_each_list_with_an_entry_a_sample_the_same_samples_are_taken() -> None:
    batch = {"x": torch.arange(3), "name": ["a", "b", "c"], "id": (1, None, 3), "shared": torch.ones(2, 3), "k": 3}
    fresh = selected(batch, 3, [2, 0])
    assert (fresh["x"].tolist(), fresh["name"], fresh["id"]) == ([2, 0], ["c", "a"], (3, 1))
    assert fresh["shared"] is batch["shared"]
    assert fresh["k"] == 3


def test_gradients_flow_back_to_the_samples_that_were_taken() -> None:
    x = torch.zeros(3, 2, requires_grad=True)
    selected([x], 3, [2, 0, 2])[0].sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1, 1], [0, 0], [2, 2]]
