"""Batches of other labelled data, and the samples of the training set that are chosen."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import zoo
from lightning_fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_robust.attach.labelled import read_labelled, training_data
from lightning_robust.attach.probe import Probe
from lightning_robust.attach.step import Step
from lightning_robust.attach.watcher import ProbeError
from lightning_robust.randomness import RandomState, seeded

DATA = TensorDataset(zoo.images(50), zoo.labels(50))


def with_training(loader: Any) -> Any:
    return SimpleNamespace(train_dataloader=loader)


def rows(loader: Any) -> list[int]:
    return [int(i) for (batch,) in loader for i in batch]


# -- the choice --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"batch_size": 8, "shuffle": True}, {"batch_size": 8, "drop_last": True}, {}])
def test_training_samples_are_a_seeded_choice_in_the_order_of_the_data(settings: dict[str, Any]) -> None:
    data = TensorDataset(torch.arange(40))
    loader = training_data(with_training(DataLoader(data, **settings)), 15, seed=2)
    assert rows(loader) == sorted(torch.randperm(40, generator=seeded(2)).tolist()[:15])
    assert loader.batch_size == settings.get("batch_size", 1)
    assert rows(training_data(with_training(DataLoader(data)), 100, seed=2)) == list(range(40))


def test_the_users_own_collate_function_makes_the_batches() -> None:
    def tens(samples: list[Any]) -> Any:
        return (torch.stack([x for (x,) in samples]) * 10,)

    loader = DataLoader(TensorDataset(torch.arange(6)), 2, collate_fn=tens)
    assert rows(training_data(with_training(loader), 6, 0)) == [0, 10, 20, 30, 40, 50]


def test_a_batch_sampler_of_torch_tells_which_samples_it_draws() -> None:
    data = TensorDataset(torch.arange(9))
    for sampler, drawn in ((SequentialSampler(data), list(range(9))), (SubsetRandomSampler([1, 4, 7]), [1, 4, 7])):
        loader = training_data(with_training(DataLoader(data, batch_sampler=BatchSampler(sampler, 3, False))), 9, 0)
        assert rows(loader) == drawn
        assert loader.batch_size == 3


def test_of_a_subset_sampler_a_seeded_choice_of_its_own_samples_is_taken() -> None:
    data, part = TensorDataset(torch.arange(40)), list(range(5, 35, 2))
    sampler = SubsetRandomSampler(part)
    for wrapped in (sampler, DistributedSamplerWrapper(sampler, num_replicas=2, rank=1)):
        loader = training_data(with_training(DataLoader(data, 8, sampler=wrapped)), 4, seed=2)
        assert rows(loader) == sorted(part[i] for i in torch.randperm(15, generator=seeded(2)).tolist()[:4])


def test_all_samples_may_be_taken_of_those_that_are_dealt_or_weighted_but_none_of_no_weight() -> None:
    data = TensorDataset(torch.arange(6))
    dealt = DistributedSampler(data, 2, 0)
    assert rows(training_data(with_training(DataLoader(data, sampler=dealt)), 6, 0)) == [0, 1, 2, 3, 4, 5]
    weighted = WeightedRandomSampler([1.0, 0.5, 0.0, 2.0, 0.0, 1.0], 20)
    assert rows(training_data(with_training(DataLoader(data, sampler=weighted)), 6, 0)) == [0, 1, 3, 5]


class Evens(Sampler[int]):
    """A sampler of somebody's own."""

    def __iter__(self) -> Any:
        return iter([0, 2, 4])


class Pairs(BatchSampler):
    """Batches of somebody's own."""


def test_samplers_of_somebodys_own_do_not_tell_what_they_draw() -> None:
    data = TensorDataset(torch.arange(6))
    for loader in (
        DataLoader(data, sampler=Evens()),
        DataLoader(data, batch_sampler=Pairs(SequentialSampler(data), 2, False)),
        DataLoader(data, batch_size=None, sampler=Evens()),
    ):
        assert training_data(with_training(loader), 6, 0) is None


class InWorkers(Dataset[Any]):
    """Opened by whoever reads first, and then no other process's."""

    opened_by = 0

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        self.opened_by = self.opened_by or os.getpid()
        return torch.tensor([index, self.opened_by])


def initialise(worker: int) -> None:
    torch.utils.data.get_worker_info().dataset.dataset.opened_by = -1 - worker  # type: ignore[union-attr]  # in a worker


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork.*:DeprecationWarning")
def test_where_the_training_loader_has_workers_one_reads_and_not_this_process() -> None:
    for workers in (0, 2):
        data = InWorkers()
        loader = training_data(with_training(DataLoader(data, 3, num_workers=workers)), 6, 0)
        seen = torch.cat(list(loader))
        assert seen[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
        assert (data.opened_by == os.getpid()) is (workers == 0)
        assert len(seen[:, 1].unique()) == 1
    given = DataLoader(data, 3, num_workers=2, worker_init_fn=initialise, multiprocessing_context="fork")
    loader = training_data(with_training(given), 6, 0)
    assert torch.cat(list(loader))[:, 1].unique().tolist() == [-1]
    assert loader.multiprocessing_context is given.multiprocessing_context


def test_ready_batches_come_as_they_are_in_a_seeded_order() -> None:
    batches = [(torch.arange(3) + 10 * i,) for i in range(5)]
    loader = training_data(with_training(DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)), 6, 1)  # type: ignore[arg-type]  # a list will do
    order = torch.randperm(5, generator=seeded(1)).tolist()
    assert rows(loader) == [10 * i + j for i in order for j in range(3)]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(DATA)


@pytest.mark.parametrize("loader", [None, [DataLoader(DATA)], {"a": DataLoader(DATA)}, DataLoader(Stream()), [1, 2]])
def test_without_one_data_set_of_known_length_there_is_nothing(loader: Any) -> None:
    assert training_data(with_training(loader), 5, 0) is None


# -- reading -----------------------------------------------------------------------------------------------------------


class Reader(pl.Callback):
    """Reads a source in the first evaluation batch."""

    def __init__(self, source: Any, limit: int, **settings: Any) -> None:
        self.arguments: tuple[Any, ...] = (source, limit, "fit_data")
        self.settings = settings
        self.logits: list[Any] = []
        self.labels: list[int] = []
        self.index: list[int] = []
        self.counts: list[bool] = []

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, _: int = 0) -> None:
        if batch_idx:
            return
        before = RandomState.capture()
        step = Step.of(module, "validation_step", batch, batch_idx)
        for reading, index, counts in read_labelled(trainer, Probe(), step, *self.arguments, **self.settings):
            call = reading.read(reading.x)
            self.logits.append(call.logits)
            self.labels += call.labels().tolist()
            self.index += index.tolist()
            self.counts += counts.tolist()
        assert before.is_current()


def read(source: Any, limit: int, **settings: Any) -> tuple[Reader, Any]:
    module, reader = zoo.built(zoo.ListBatch), Reader(source, limit, **settings)
    zoo.trainer(callbacks=[reader]).validate(module, DataLoader(DATA, 10), verbose=False)
    return reader, module


def test_a_data_set_is_read_by_a_seeded_choice_with_its_own_labels() -> None:
    other = TensorDataset(zoo.images(30, 3), zoo.labels(30, 7))
    reader, module = read(other, 12, seed=4, batch_size=5)
    chosen = sorted(torch.randperm(30, generator=seeded(4)).tolist()[:12])
    with torch.no_grad():
        expected = module.eval().net(other.tensors[0][chosen])
    torch.testing.assert_close(torch.cat(reader.logits), expected)
    assert reader.labels == other.tensors[1][chosen].tolist()
    assert reader.index == list(range(12))
    assert all(reader.counts)


def test_of_a_loader_the_first_samples_count_also_in_the_middle_of_a_batch() -> None:
    reader, _ = read(DataLoader(TensorDataset(zoo.images(30, 3), zoo.labels(30)), 8), 12)
    assert reader.index == list(range(16))
    assert reader.counts == [i < 12 for i in range(16)]


def test_batches_of_another_make_are_refused_with_both_makes() -> None:
    says = r"fit_data: batches with batch\[0\].*those of the evaluation loader have .*batch\[1\].*made alike"
    with pytest.raises(ProbeError, match=says):
        read(TensorDataset(zoo.images(5)), 5)


def test_batches_that_hold_shares_of_classes_are_refused() -> None:
    soft = TensorDataset(zoo.images(20, 3), torch.full((20, 10), 0.1))
    with pytest.raises(ProbeError, match=r"fit_data: .* at batch\[1\] evaluation has classes, .*MixUp, CutMix"):
        read(soft, 5)
