"""Evaluation loaders in the forms that Lightning keeps them in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler, SubsetRandomSampler, TensorDataset

from lightning_robust.attach.loaders import (
    evaluation_loaders,
    is_everyones,
    named,
    own_batches,
    shuffles,
    size_of,
    transferred,
    true_length,
)
from lightning_robust.randomness import RandomState

DATA = TensorDataset(torch.zeros(101))
ONE, TWO = DataLoader(DATA), DataLoader(DATA, 2)


@pytest.mark.parametrize(
    ("loaders", "names"),
    [
        (ONE, ["0"]),
        ([ONE, TWO], ["0", "1"]),
        ({"near": ONE, "far": TWO}, ["near", "far"]),
        ({"a": [ONE, TWO], "b": ONE}, ["a/0", "a/1", "b"]),
    ],
)
def test_loaders_are_named_in_order(loaders: Any, names: list[str]) -> None:
    assert [name for name, _ in named(loaders)] == names
    assert named(loaders)[0][1] is ONE


def test_the_stage_decides_which_loaders_are_meant() -> None:
    assert evaluation_loaders(SimpleNamespace(testing=True, test_dataloaders=ONE, val_dataloaders=TWO)) == [("0", ONE)]
    assert evaluation_loaders(SimpleNamespace(testing=False, test_dataloaders=ONE, val_dataloaders=TWO)) == [("0", TWO)]


def test_a_distributed_sampler_does_not_lengthen_the_data() -> None:
    sampler = DistributedSampler(DATA, num_replicas=2, rank=0, shuffle=False)
    assert len(sampler) * 2 == 102  # one sample is dealt twice
    assert true_length(DataLoader(DATA, sampler=sampler), world=2) == 101


def process(rank: int = 0, world: int = 1) -> SimpleNamespace:
    return SimpleNamespace(world_size=world, global_rank=rank, lightning_module=None)


NUMBERS = TensorDataset(torch.arange(101))


def taken(loader: Any, rank: int = 0, world: int = 1, limit: float = float("inf")) -> list[tuple[int, int]]:
    """Every sample with the number that it is given."""
    pairs = []
    for batch, index in own_batches(process(rank, world), loader, limit):
        pairs += list(zip(batch[0].tolist(), index.tolist(), strict=True))
    return pairs


def test_one_process_takes_all_batches_in_order() -> None:
    assert taken(DataLoader(NUMBERS, 16)) == [(i, i) for i in range(101)]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_batches_and_agree_on_the_numbers(world: int) -> None:
    shares = [taken(DataLoader(NUMBERS, 16), rank, world) for rank in range(world)]
    assert sorted(pair for share in shares for pair in share) == [(i, i) for i in range(101)]
    assert all(len(share) >= 101 // world - 16 for share in shares)


@pytest.mark.parametrize("world", [2, 3])
def test_what_a_distributed_sampler_has_dealt_is_not_dealt_again(world: int) -> None:
    pairs = []
    for rank in range(world):
        sampler = DistributedSampler(NUMBERS, num_replicas=world, rank=rank, shuffle=False)
        pairs += taken(DataLoader(NUMBERS, 16, sampler=sampler), rank, world)
    assert sorted(pair for pair in pairs if pair[1] < 101) == [(i, i) for i in range(101)]
    assert all(i >= 101 or i == sample for sample, i in pairs)


def test_a_limit_stops_at_the_batch_that_reaches_it_in_every_process() -> None:
    assert len(taken(DataLoader(NUMBERS, 16), limit=20)) == 32
    assert [len(taken(DataLoader(NUMBERS, 16), rank, 2, limit=20)) for rank in (0, 1)] == [16, 16]
    sampler = DistributedSampler(NUMBERS, num_replicas=2, rank=1, shuffle=False)
    assert len(taken(DataLoader(NUMBERS, 5, sampler=sampler), 1, 2, limit=20)) == 10
    assert taken(DataLoader(NUMBERS, 16), limit=16) == [(i, i) for i in range(16)]


@pytest.mark.parametrize("shuffle", [False, True])
def test_iterating_leaves_the_random_streams_alone(shuffle: bool) -> None:
    state = RandomState.capture()
    assert sorted(taken(DataLoader(NUMBERS, 16, shuffle=shuffle))) != []
    assert state.is_current()
    list(DataLoader(NUMBERS, 16, shuffle=shuffle))  # which does draw
    assert not state.is_current()


def test_any_iterable_of_batches_will_do() -> None:
    batches = [[torch.tensor([0, 1])], [torch.tensor([2])]]
    assert taken(batches) == taken(iter(batches)) == [(0, 0), (1, 1), (2, 2)]


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ([torch.zeros(16, 3), torch.zeros(16)], 16),
        (torch.zeros(5), 5),
        ({"id": 3, "mean": torch.tensor(1.0), "x": torch.zeros(4, 2)}, 4),
        ({"scale": torch.zeros(1), "x": torch.zeros(8, 2), "y": torch.zeros(8)}, 8),
        ([torch.zeros(4, 3), torch.zeros(10)], 4),
    ],
)
def test_the_size_of_a_batch_is_the_number_of_rows_of_most_tensors(batch: Any, size: int) -> None:
    assert size_of(batch) == size


def test_a_batch_without_rows_is_an_error_that_describes_it() -> None:
    with pytest.raises(ValueError, match=r"tensor of samples.*batch\[0\] float32 \(\), batch\[1\] str"):
        size_of([torch.tensor(1.0), "x"])


class Hooks:
    """Moves batches in a way that shows the order of what was done."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 1, batch[1]]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 2, batch[1]]


class InModule(Hooks, zoo.ListBatch):
    pass


class Module(zoo.ListBatch):
    pass


class Data(pl.LightningDataModule):
    def val_dataloader(self) -> Any:
        return zoo.loader(zoo.ListBatch)


class DataWithHooks(Hooks, Data):
    pass


class DataBefore(Data):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 5, batch[1]]


@pytest.mark.filterwarnings("ignore:You have overridden `on_.*_batch_transfer`:UserWarning")
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
@pytest.mark.parametrize("module", [Module, InModule], ids=lambda c: c.__name__)
@pytest.mark.parametrize("datamodule", [Data, DataWithHooks, DataBefore], ids=lambda c: c.__name__)
def test_a_batch_of_ours_arrives_as_a_batch_of_the_loader_does(
    module: type[zoo.ListBatch], datamodule: type[Data], precision: Any
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Comparing(pl.Callback):
        def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
            seen.append((batch[0], transferred(trainer, pl_module, zoo.ListBatch.batch(16))[0]))

    trainer = zoo.trainer(callbacks=[Comparing()], precision=precision)
    trainer.validate(zoo.built(module), datamodule=datamodule(), verbose=False)
    assert len(seen) == 2
    for theirs, ours in seen:
        assert theirs.dtype == ours.dtype
        assert torch.equal(theirs, ours)


class Dealing(SequentialSampler):
    """A sampler of somebody's own, who may well deal samples to processes."""


def test_only_torchs_own_samplers_give_everybody_everything() -> None:
    dataset = TensorDataset(torch.zeros(4, 1))
    assert is_everyones(DataLoader(dataset, 2))
    assert is_everyones(DataLoader(dataset, 2, shuffle=True))
    assert not is_everyones(DataLoader(dataset, 2, sampler=Dealing(dataset)))
    assert not is_everyones(DataLoader(dataset, 2, sampler=DistributedSampler(dataset, 2, 0)))
    assert not is_everyones([torch.zeros(2)])


def test_who_shuffles_is_known_of_the_samplers_of_torch_and_of_nobody_else() -> None:
    assert shuffles(DataLoader(DATA, shuffle=True))
    assert shuffles(DataLoader(DATA, sampler=SubsetRandomSampler([3, 5])))
    assert not shuffles(DataLoader(DATA, sampler=SequentialSampler(DATA)))
    assert not shuffles([torch.zeros(3)])
