from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from lightning_robust.pixels import PixelSpace, clamped

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def test_normalised_and_back_is_the_identity_in_each_channel() -> None:
    space = PixelSpace(mean=MEAN, std=STD)
    x = torch.rand(4, 3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(space.to_pixels(space.to_model(x)), x, rtol=0, atol=1e-14)
    torch.testing.assert_close(space.to_model(space.to_pixels(x)), x, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 7), (2, 3, 4, 5), (2, 3, 2, 4, 5)])
def test_channels_are_dimension_one_whatever_stands_behind_it(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape)
    seen = PixelSpace(mean=MEAN, std=STD).to_model(x)
    for c in range(3):
        torch.testing.assert_close(seen[:, c], (x[:, c] - MEAN[c]) / STD[c])


def test_without_normalisation_model_inputs_are_the_pixels() -> None:
    x = torch.rand(2, 3)
    assert not PixelSpace().normalises
    assert PixelSpace().to_pixels(x) is x
    assert PixelSpace().to_model(x) is x


@pytest.mark.parametrize(
    ("given", "computed"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_pixels_are_computed_in_at_least_float32(given: torch.dtype, computed: torch.dtype) -> None:
    for space in (PixelSpace(), PixelSpace(mean=0.5, std=0.25)):
        pixels = space.to_pixels(torch.zeros(1, 3, dtype=given))
        assert pixels.dtype == computed
        assert space.to_model(pixels, given).dtype == given


@pytest.mark.parametrize(
    "given",
    [
        [0.5, 0.25],
        (0.5, 0.25),
        np.array([0.5, 0.25]),
        torch.tensor([0.5, 0.25]),
        torch.tensor([0.5, 0.25]).view(2, 1, 1),
    ],
    ids=["list", "tuple", "numpy", "tensor", "broadcastable tensor"],
)
def test_every_spelling_of_the_channels_gives_the_same_hashable_space(given: Any) -> None:
    space, plain = PixelSpace(mean=given, std=given), PixelSpace(mean=(0.5, 0.25), std=(0.5, 0.25))
    assert space.mean == (0.5, 0.25)
    assert type(space.mean) is type(space.std) is tuple
    assert all(type(v) is float for v in space.mean)
    assert space == plain
    assert hash(space) == hash(plain)


@pytest.mark.parametrize(
    "given", [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5), [0.5]], ids=lambda v: type(v).__name__
)
def test_every_spelling_of_one_number_gives_the_same_space(given: Any) -> None:
    assert PixelSpace(bounds=[0, 1], mean=given, std=given) == PixelSpace(mean=0.5, std=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bounds": (1, 0)}, r"lowest < highest, got \(1, 0\)"),
        ({"bounds": (0, 0)}, "lowest < highest"),
        ({"bounds": (math.nan, 1)}, "lowest < highest"),
        ({"std": 0.0}, "std=.*positive"),
        ({"std": (0.2, -0.2)}, "std=.*positive"),
        ({"std": math.nan}, "std=.*finite"),
        ({"mean": math.inf}, "mean=.*finite"),
        ({"mean": ()}, "mean=.*one finite number or one per channel"),
        ({"mean": (0.1, 0.2, 0.3), "std": (0.1, 0.2)}, "3 means but 2 standard deviations"),
        ({"outside": "ignore"}, "'raise' or 'widen', got 'ignore'"),
    ],
)
def test_impossible_spaces_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelSpace(**arguments)


def test_a_wrong_number_of_channels_names_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"3 channels, but inputs of shape \(2, 4, 5, 5\) have 4"):
        PixelSpace(mean=MEAN).to_model(torch.rand(2, 4, 5, 5))


@pytest.mark.parametrize(
    ("space", "x", "ranges_and_cause"),
    [
        (PixelSpace(), [[0.0, 255.0]], r"within \[0, 1\], got \[0, 255\]\. .*0\.\.255 images.*bounds=\(0, 255\)"),
        (PixelSpace(), [[-2.0, 2.5]], r"within \[0, 1\], got \[-2, 2\.5\]\. .*look normalised.*mean=\.\.\., std="),
        (PixelSpace(mean=0.5, std=0.5), [[-3.0, 1.0]], r"got \[-1, 1\] after undoing mean and std\. Check bounds"),
        (PixelSpace(bounds=(0, 255)), [[0.0, 300.0]], r"within \[0, 255\], got \[0, 300\]\. Check bounds"),
        (PixelSpace(), [[math.nan, math.inf, 0.5]], "finite inputs, got 2 NaN or infinite"),
        (PixelSpace(bounds=None), [[math.nan]], "finite inputs, got 1 NaN"),
    ],
    ids=["0..255", "normalised", "wrong mean", "other bounds", "NaN", "NaN without a box"],
)
def test_inputs_outside_raise_with_both_ranges_and_the_likely_cause(
    space: PixelSpace, x: list[list[float]], ranges_and_cause: str
) -> None:
    with pytest.raises(ValueError, match=ranges_and_cause):
        space.check(torch.tensor(x))


@pytest.mark.parametrize(
    ("x", "says"),
    [
        ([[0.0, 255.0]], r"use PixelSpace\(bounds=\(0, 255\)\)\.$"),
        ([[-2.0, 2.0]], r"the numbers that the data pipeline uses\.$"),
        ([[0.0, 300.0]], r"PixelSpace\(outside='widen'\) has values outside moved"),
    ],
)
def test_where_nothing_is_attacked_neither_eps_nor_a_missing_box_is_spoken_of(x: list[list[float]], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        PixelSpace().check(torch.tensor(x), attacked=False)
    assert "eps" not in str(caught.value)
    assert "None" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_black_and_white_normalised_in_any_precision_are_still_inside(dtype: torch.dtype) -> None:
    space = PixelSpace(mean=MEAN, std=STD)
    pixels = torch.tensor([0.0, 1.0]).view(2, 1).expand(2, 3)
    x = space.to_model(pixels, dtype)
    assert space.count_outside(x) == 0
    space.check(x)


def test_samples_outside_are_counted_not_values() -> None:
    x = torch.tensor([[0.0, 1.0], [-0.1, 1.1], [0.5, 1.1], [0.0, 1.00005]])
    assert PixelSpace().count_outside(x) == 2
    assert PixelSpace(bounds=(0, 255)).count_outside(x * 255) == 2
    assert PixelSpace(mean=0.5, std=0.25).count_outside((x - 0.5) / 0.25) == 2


def test_without_bounds_nothing_is_outside_and_nothing_is_clamped() -> None:
    space, x = PixelSpace(bounds=None), torch.tensor([[-1e6, 1e6]])
    space.check(x)
    assert space.count_outside(x) == 0
    assert torch.equal(clamped(x, space.box(x)), x)


def test_a_widened_box_is_elementwise_and_leaves_clean_inputs_unmoved() -> None:
    space, clean = PixelSpace(outside="widen"), torch.tensor([[-0.2, 0.5, 1.3]])
    box = space.box(clean)
    assert torch.equal(clamped(clean, box), clean)
    assert torch.equal(clamped(clean - 9, box), torch.tensor([[-0.2, 0.0, 0.0]]))
    assert torch.equal(clamped(clean + 9, box), torch.tensor([[1.0, 1.0, 1.3]]))
