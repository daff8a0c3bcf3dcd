"""Decibels, against scikit-image."""

from __future__ import annotations

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from lightning_robust.corruptions import psnr


def test_as_scikit_image_has_it() -> None:
    x, y = torch.rand(2, 3, 3, 8, 8)
    expected = [peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=1) for a, b in zip(y, x, strict=True)]
    assert psnr(x, y).tolist() == pytest.approx(expected, rel=1e-6)


def test_equal_pictures_are_infinitely_near() -> None:
    x = torch.rand(2, 1, 4, 4)
    assert psnr(x, x).tolist() == [float("inf")] * 2


def test_other_shapes_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"one shape \(N, ...\), got \(1, 1, 4, 4\) and \(2, 1, 4, 4\)"):
        psnr(torch.zeros(1, 1, 4, 4), torch.zeros(2, 1, 4, 4))
