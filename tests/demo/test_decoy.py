"""Digits with a giveaway: it tells in training and validation, and misleads in the test."""

from __future__ import annotations

from pathlib import Path

import pytest
import scipy.stats
import torch
from pytorch_lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust.demo import Classifier, DecoyDigits, Digits
from lightning_robust.randomness import untouched_random_state

PARTS = ("train", "val", "test")
SHADES = (255 - 25 * torch.arange(10)) / 255


def tensors(data: Digits) -> dict[str, tuple[Tensor, ...]]:
    data.setup("fit")
    return {part: dataset.tensors for part, dataset in data.parts.items()}


@pytest.fixture(scope="module")
def plain() -> dict[str, tuple[Tensor, ...]]:
    return tensors(Digits())


@pytest.fixture(scope="module")
def data() -> DecoyDigits:
    return DecoyDigits(batch_size=32)


@pytest.fixture(scope="module")
def decoy(data: DecoyDigits) -> dict[str, tuple[Tensor, ...]]:
    return tensors(data)


@pytest.fixture(scope="module")
def control() -> dict[str, tuple[Tensor, ...]]:
    return tensors(DecoyDigits(random_fill=True))


def shades(images: Tensor, masks: Tensor) -> Tensor:
    """The one shade of each square."""
    squares = images[masks.bool()].view(len(images), 16)
    assert bool((squares == squares[:, :1]).all())
    return squares[:, 0]


@pytest.mark.parametrize(("part", "size"), [("train", 4000), ("val", 500), ("test", 500)])
def test_digits_are_those_of_the_plain_data_outside_the_square(
    plain: dict[str, tuple[Tensor, ...]], decoy: dict[str, tuple[Tensor, ...]], part: str, size: int
) -> None:
    (images, labels), (marked, marked_labels, masks) = plain[part], decoy[part]
    assert marked.shape == masks.shape == (size, 1, 28, 28)
    assert marked.dtype == masks.dtype == torch.float32
    assert torch.equal(labels, marked_labels)
    assert torch.equal(marked * (1 - masks), images * (1 - masks))


@pytest.mark.parametrize("part", PARTS)
def test_squares_are_4_by_4_in_any_of_the_corners(decoy: dict[str, tuple[Tensor, ...]], part: str) -> None:
    masks = decoy[part][2]
    seen = []
    for rows in (slice(0, 4), slice(24, 28)):
        for columns in (slice(0, 4), slice(24, 28)):
            corner = torch.zeros(1, 28, 28)
            corner[:, rows, columns] = 1
            seen.append(int((masks == corner).flatten(1).all(1).sum()))
    assert sum(seen) == len(masks)
    assert scipy.stats.chisquare(seen).pvalue > 0.01


@pytest.mark.parametrize("part", ["train", "val"])
def test_the_shade_tells_the_label_in_training_and_validation(decoy: dict[str, tuple[Tensor, ...]], part: str) -> None:
    images, labels, masks = decoy[part]
    assert torch.equal(shades(images, masks), SHADES[labels])


@pytest.mark.parametrize(("which", "part"), [("decoy", "test"), *(("control", part) for part in PARTS)])
def test_a_random_shade_is_one_of_the_ten_and_tells_nothing(
    which: str, part: str, request: pytest.FixtureRequest
) -> None:
    images, labels, masks = request.getfixturevalue(which)[part]
    classes = (shades(images, masks)[:, None] == SHADES).long()
    assert torch.equal(classes.sum(1), torch.ones(len(images), dtype=torch.long))
    table = torch.zeros(10, 10).index_put_((labels, classes.argmax(1)), torch.ones(len(labels)), accumulate=True)
    assert scipy.stats.chi2_contingency(table.numpy()).pvalue > 0.01


def test_the_control_differs_in_nothing_but_shades(
    decoy: dict[str, tuple[Tensor, ...]], control: dict[str, tuple[Tensor, ...]]
) -> None:
    for part in PARTS:
        (images, _, masks), (others, _, other_masks) = decoy[part], control[part]
        assert torch.equal(masks, other_masks)
        assert torch.equal(images * (1 - masks), others * (1 - masks))
        assert torch.equal(images, others) == (part == "test")


def test_squares_follow_the_split_seed_and_nothing_else(decoy: dict[str, tuple[Tensor, ...]]) -> None:
    torch.manual_seed(123)
    with untouched_random_state() as state:
        again, other = tensors(DecoyDigits()), tensors(DecoyDigits(split_seed=1))
        assert state.is_current()
    for part in PARTS:
        assert all(map(torch.equal, again[part], decoy[part]))
        assert not torch.equal(other[part][2], decoy[part][2])
    assert not torch.equal(decoy["val"][2], decoy["test"][2])


def test_a_second_setup_keeps_what_was_dealt(data: DecoyDigits) -> None:
    data.setup("fit")
    before = dict(data.parts)
    data.setup("test")
    assert data.parts == before


def test_batches_have_three_entries_and_the_demo_classifier_takes_them(tmp_path: Path) -> None:
    images, labels, masks = torch.rand(8, 1, 8, 8), torch.arange(8) % 3, torch.zeros(8, 1, 8, 8)
    loader = DataLoader(TensorDataset(images, labels, masks), batch_size=4)
    module = Classifier(classes=3, size=8)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    trainer = Trainer(default_root_dir=str(tmp_path), fast_dev_run=1, **quiet)
    trainer.fit(module, loader, loader)
    assert {"train/loss", "val/accuracy"} <= set(trainer.callback_metrics)
    trainer.test(module, loader, verbose=False)
    assert "test/accuracy" in trainer.callback_metrics


def test_loaders_hand_out_images_labels_and_masks(data: DecoyDigits, decoy: dict[str, tuple[Tensor, ...]]) -> None:
    assert [len(entry) for entry in next(iter(data.train_dataloader()))] == [32] * 3
    first = next(iter(data.test_dataloader()))
    assert all(torch.equal(entry, whole[:250]) for entry, whole in zip(first, decoy["test"], strict=True))
