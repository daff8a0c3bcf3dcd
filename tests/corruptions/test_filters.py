"""Filters agree with scipy's, and one picture's result does not depend on the others."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from lightning_robust.corruptions.filters import blurred, convolved, gaussian_matrix, smeared, zoomed

SHAPE = (2, 3, 20, 27)


def pictures() -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def each(x: Tensor, function: object, **settings: object) -> Tensor:
    """A function of scipy for one channel, for all of them."""
    assert callable(function)
    planes = [torch.as_tensor(function(plane.numpy(), **settings)) for plane in x.flatten(0, 1)]
    return torch.stack(planes).view_as(x)


@pytest.mark.parametrize("sigma", [0.05, 0.4, 1.0, 6.0, 30.0])
def test_a_gaussian_is_that_of_scipy(sigma: float) -> None:
    expected = each(pictures(), scipy.ndimage.gaussian_filter, sigma=sigma, mode="reflect", truncate=4.0)
    torch.testing.assert_close(blurred(pictures(), sigma), expected)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 100.0])
def test_rows_of_a_gaussian_sum_to_one(sigma: float) -> None:
    torch.testing.assert_close(gaussian_matrix(9, sigma).sum(1), torch.ones(9, dtype=torch.float64))


@pytest.mark.parametrize("side", [1, 5, 13])
def test_a_kernel_works_as_in_scipy(side: int) -> None:
    kernel = torch.rand(side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = each(pictures(), scipy.ndimage.correlate, weights=kernel.numpy(), mode="reflect")
    torch.testing.assert_close(convolved(pictures(), kernel), expected)


@pytest.mark.parametrize("angle", [0.0, 30.0, -45.0, -90.0, -135.0])
def test_dragging_is_half_a_gaussian_along_a_line(angle: float) -> None:
    length, sigma = 9, 2.5
    kernel = np.zeros((2 * length + 1, 2 * length + 1))
    for i in range(length):
        down, right = (math.floor(i * f(math.radians(angle)) + 0.5) for f in (math.sin, math.cos))
        kernel[length + down, length + right] += math.exp(-(i**2) / (2 * sigma**2))
    expected = each(pictures(), scipy.ndimage.correlate, weights=kernel / kernel.sum(), mode="nearest")
    torch.testing.assert_close(smeared(pictures(), 4, sigma, [angle] * 2), expected)


def test_every_picture_is_dragged_along_its_own_line() -> None:
    x = pictures()
    together = smeared(x, 4, 2.0, [10.0, -40.0])
    assert torch.equal(together[1:], smeared(x[1:], 4, 2.0, [-40.0]))


@pytest.mark.parametrize("factor", [1.0, 1.01, 1.5, 4.0])
def test_a_zoom_is_that_of_scipy_around_the_middle(factor: float) -> None:
    def of_scipy(plane: np.ndarray) -> np.ndarray:
        tall, wide = (math.ceil(side / factor) for side in plane.shape)
        top, left = (plane.shape[0] - tall) // 2, (plane.shape[1] - wide) // 2
        large = scipy.ndimage.zoom(plane[top : top + tall, left : left + wide], factor, order=1)
        top, left = ((a - b) // 2 for a, b in zip(large.shape, plane.shape, strict=True))
        return large[top : top + plane.shape[0], left : left + plane.shape[1]].copy()

    torch.testing.assert_close(zoomed(pictures(), factor), each(pictures(), of_scipy))
