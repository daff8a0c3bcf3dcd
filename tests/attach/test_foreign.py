"""Inputs of other loaders are found by their looks, and data sets are sampled by a seed."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_robust.attach.foreign import foreign_input, foreign_loader, make_of, same_make

LIKE = torch.zeros(4, 1, 3, 3)


def test_a_data_set_gives_a_seeded_choice_in_its_own_order() -> None:
    dataset = TensorDataset(torch.arange(100.0))
    batches = [torch.cat([x for (x,) in foreign_loader(dataset, 4, 10, seed)]) for seed in (0, 0, 1)]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])
    assert torch.equal(batches[0], batches[0].sort().values)
    assert [len(b) for b in batches] == [10, 10, 10]


def test_loaders_and_lists_come_as_they_are_and_streams_get_batches() -> None:
    class Stream(IterableDataset[float]):
        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter([1.0, 2.0, 3.0])

    loader = DataLoader(TensorDataset(torch.zeros(3)), 2)
    given = [torch.zeros(2)]
    assert foreign_loader(loader, 4, 10, 0) is loader
    assert foreign_loader(given, 4, 10, 0) is given
    assert [len(batch) for batch in foreign_loader(Stream(), 2, 10, 0)] == [2, 1]


def test_the_one_tensor_that_looks_like_an_input_is_the_input() -> None:
    x = torch.rand(5, 1, 3, 3, dtype=torch.float64)
    found = foreign_input({"label": torch.zeros(5), "image": x}, None, LIKE, "set 'a'")
    assert found.dtype == LIKE.dtype
    assert torch.equal(found, x.float())
    assert torch.equal(foreign_input({}, x, LIKE, "set 'a'"), x.float())


@pytest.mark.parametrize("batch", [{"image": torch.zeros(5, 3, 3, 3)}, [LIKE, LIKE], []])
def test_none_or_several_are_an_error_that_names_the_set(batch: object) -> None:
    with pytest.raises(ValueError, match=r"^set 'a': expected inputs like those .*\(N, 1, 3, 3\)"):
        foreign_input(batch, None, LIKE, "set 'a'")


def test_batches_are_of_one_make_where_their_tensors_are_at_the_same_places() -> None:
    one = {"image": LIKE, "meta": [torch.zeros(4), "a name"], "names": ["a", "b"]}
    assert make_of(one) == {("image",), ("meta", 0)}
    assert same_make(one, {"names": ["c"], "image": torch.zeros(9, 3), "meta": [torch.zeros(9), None]})
    assert same_make([LIKE, LIKE], (LIKE, LIKE))  # collating makes lists of tuples
    for other in ({"image": LIKE}, [LIKE, LIKE], LIKE):
        assert not same_make(one, other)
