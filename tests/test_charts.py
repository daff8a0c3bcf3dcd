"""The curve in TensorBoard: points and band where they belong."""

from __future__ import annotations

import torch

from lightning_robust.charts import BAND, BOTTOM, LEFT, LINE, RIGHT, TOP, accuracy_curve


def coloured(picture: torch.Tensor, colour: tuple[int, int, int], at: tuple[int, int]) -> bool:
    return [round(float(v) * 255) for v in picture[:, at[1], at[0]]] == list(colour)


def test_a_point_lies_at_its_radius_and_its_accuracy_and_the_band_around_it() -> None:
    radii, accuracies = [0.0, 0.1, 0.4], [1.0, 0.5, 0.0]
    bands = [(0.8, 1.0), (0.3, 0.7), (0.0, 0.2)]
    picture = accuracy_curve(radii, accuracies, bands, "validation", "linf radius")
    assert picture.shape == (3, 420, 420)
    assert picture.dtype == torch.float32
    assert 0 <= float(picture.min()) < float(picture.max()) <= 1
    for radius, accuracy in zip(radii, accuracies, strict=True):
        across = round(LEFT + (RIGHT - LEFT) * radius / 0.4)
        up = round(BOTTOM - (BOTTOM - TOP) * accuracy)
        assert coloured(picture, LINE, (across, up))
    middle = round(LEFT + (RIGHT - LEFT) * 0.25)
    inside, outside = (round(BOTTOM - (BOTTOM - TOP) * share) for share in (0.65, 0.75))
    assert coloured(picture, BAND, (middle, inside))
    assert coloured(picture, (255, 255, 255), (middle, outside))


def test_a_single_radius_of_zero_is_no_division_by_zero() -> None:
    assert coloured(accuracy_curve([0.0], [1.0], [(1.0, 1.0)], "", ""), LINE, (LEFT, TOP))
