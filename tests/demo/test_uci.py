"""Digits from elsewhere: what they are made of."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits

from lightning_robust.demo import UCIDigits


def test_they_are_the_digits_of_scikit_learn_enlarged_and_framed() -> None:
    data = UCIDigits()
    images, labels = data.tensors
    raw, expected = load_digits(return_X_y=True)
    assert labels.tolist() == expected.tolist()
    assert images.shape == (1797, 1, 28, 28)
    assert images.dtype == torch.float32
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    frame = images.clone()
    frame[:, :, 4:24, 4:24] = 0
    assert not frame.any()
    # Enlarging keeps the mean shade of each picture: 400 of 784 pixels stand for all 64.
    mean = torch.tensor(raw / 16, dtype=torch.float32).mean(1)
    assert torch.allclose(images.mean((1, 2, 3)) * 784 / 400, mean, atol=0.02)


def test_an_item_is_a_picture_and_its_class() -> None:
    image, label = UCIDigits()[3]
    assert (image.shape, label) == ((1, 28, 28), 3)
