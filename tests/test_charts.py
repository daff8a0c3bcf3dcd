"""The curve in TensorBoard: points and band where they belong."""

from __future__ import annotations

import torch

from lightning_robust.charts import BAND, BOTTOM, LEFT, LINE, RIGHT, TOP, accuracy_curve, risk_curve


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


def test_a_risk_lies_at_its_coverage_on_a_scale_that_ends_above_the_largest() -> None:
    coverage, risk = torch.tensor([0.25, 0.5, 1.0]), torch.tensor([0.0, 0.05, 0.15])  # drawn from 0 to 0.2
    picture = risk_curve(coverage, risk, "validation")
    assert picture.shape == (3, 420, 420)
    assert picture.dtype == torch.float32
    for share, error in zip(coverage.tolist(), risk.tolist(), strict=True):
        across = round(LEFT + (RIGHT - LEFT) * share)
        up = round(BOTTOM - (BOTTOM - TOP) * error / 0.2)
        assert coloured(picture, LINE, (min(across, RIGHT - 1), up))


def test_a_first_error_does_not_squeeze_the_rest_and_is_cut_off() -> None:
    coverage, risk = torch.linspace(0.01, 1, 100), torch.linspace(0.01, 1, 100).reciprocal() * 0.01
    picture = risk_curve(coverage, risk, "")  # the surest is wrong, no other: 1, 1/2, ... 1/100
    assert coloured(picture, LINE, (round(LEFT + (RIGHT - LEFT) * 0.01), TOP))
    at_half = round(BOTTOM - (BOTTOM - TOP) * 0.02 / 0.1)  # the scale ends at 0.1, the risk of the surest tenth
    assert coloured(picture, LINE, (round(LEFT + (RIGHT - LEFT) * 0.5), at_half))


def test_predictions_that_are_all_equally_sure_have_one_risk_at_every_coverage() -> None:
    picture = risk_curve(torch.tensor([1.0]), torch.tensor([0.1], dtype=torch.float64), "")
    for share in (0.1, 0.5, 0.9):
        assert coloured(picture, LINE, (round(LEFT + (RIGHT - LEFT) * share), TOP))
