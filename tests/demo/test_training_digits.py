"""The digits to fit detectors on are those that recipes train on."""

from __future__ import annotations

import torch

from lightning_robust.demo import Digits
from lightning_robust.demo.training_digits import TrainingDigits


def test_they_are_the_training_digits_of_the_recipes_one_by_one() -> None:
    digits, data = TrainingDigits(split_seed=3), Digits(split_seed=3)
    data.setup("fit")
    assert len(digits) == len(data.parts["train"]) == 4000
    for index in (0, 1234, 3999):
        assert all(torch.equal(*pair) for pair in zip(digits[index], data.parts["train"][index], strict=True))
