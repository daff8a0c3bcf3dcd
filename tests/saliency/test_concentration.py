"""Gini, entropy and region mass in closed form and against numpy and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor

from lightning_robust.randomness import seeded
from lightning_robust.saliency.concentration import REGIONS, concentration, mass, region_named


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def gini_by_pairs(values: np.ndarray) -> float:
    """Half the mean absolute difference of all pairs, over the mean: the definition, not the sorted formula."""
    size = np.abs(values.astype(np.float64)).ravel()
    return float(np.abs(size[:, None] - size).mean() / (2 * size.mean()))


def test_an_even_map_and_a_single_input_are_the_two_ends() -> None:
    one = torch.zeros(1, 4, 5)
    one[0, 2, 2] = -3
    found = concentration(torch.cat([torch.full((1, 4, 5), 0.1), one]))
    assert found["gini"].tolist() == pytest.approx([0, 1 - 1 / 20])
    assert found["entropy"].tolist() == pytest.approx([1, 0])


def test_an_even_patch_of_a_map_has_the_entropy_of_its_logarithm() -> None:
    patch = torch.zeros(1, 10, 10)
    patch[0, :2, :5] = 7
    found = concentration(patch)
    assert float(found["entropy"]) == pytest.approx(math.log(10) / math.log(100))
    assert float(found["gini"]) == pytest.approx(1 - 10 / 100)


def test_gini_is_the_mean_difference_of_pairs_and_entropy_that_of_scipy() -> None:
    maps = torch.cat([noise(4, 6, 7), noise(4, 6, 7, seed=1).exp(), noise(4, 6, 7, seed=2) * (noise(4, 6, 7) > 0)])
    found = concentration(maps)
    assert found["gini"].tolist() == pytest.approx([gini_by_pairs(m.numpy()) for m in maps], abs=1e-12)
    expected = [entropy(np.abs(m.double().numpy()).ravel(), base=42) for m in maps]
    assert found["entropy"].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", [(3, 8), (3, 4, 5), (3, 2, 3, 4)])
def test_neither_depends_on_scale_sign_or_place(shape: tuple[int, ...]) -> None:
    maps = noise(*shape)
    moved = maps.flatten(1).flip(1).view(shape)
    for name, values in concentration(maps).items():
        for same in (1e-42 * maps.double(), -1e30 * maps, moved):
            torch.testing.assert_close(concentration(same)[name], values)


def test_empty_maps_count_as_even_and_broken_ones_are_marked() -> None:
    maps = torch.stack(
        [torch.zeros(6), torch.tensor([1.0, torch.nan, 0, 0, 0, 0]), torch.tensor([1, torch.inf, 0, 0, 0, 0])]
    )
    found = concentration(maps)
    assert [float(found[name][0]) for name in ("gini", "entropy")] == pytest.approx([0, 1])
    region = torch.tensor([1.0, 1.0, 1.0, 0, 0, 0])
    assert float(mass(maps, region)[0]) == pytest.approx(0.5)
    for values in (*found.values(), mass(maps, region)):
        assert values.isnan().tolist() == [False, True, True]


def test_the_mass_in_a_region_is_its_share_of_the_magnitudes() -> None:
    maps, region = noise(5, 6, 7), noise(6, 7, seed=3) > 0
    expected = [float(np.abs(m)[region.numpy()].sum() / np.abs(m).sum()) for m in maps.double().numpy()]
    assert mass(maps, region).tolist() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(mass(maps, region) + mass(maps, ~region), torch.ones(5).double())


def test_each_map_may_have_its_own_region_also_as_a_mask_of_images() -> None:
    maps, regions = noise(5, 6, 7), torch.rand(5, 6, 7, generator=seeded(4))
    expected = torch.stack([mass(m[None], region)[0] for m, region in zip(maps, regions, strict=True)])
    for given in (regions, regions[:, None]):
        torch.testing.assert_close(mass(maps, given), expected, rtol=0, atol=0)


def test_a_table_has_regions_of_columns() -> None:
    assert mass(torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([True, False, True])).tolist() == [0.75]


def test_the_border_is_a_frame_and_the_corners_are_its_crossings() -> None:
    border, corners = region_named("border", (5, 20)), region_named("corners", (5, 20), share=1 / 8)
    assert border.sum() == 5 * 20 - 3 * 16  # one row above and below, two columns at the sides
    assert corners.sum() == 4 * 2
    assert bool((corners <= border).all())


@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (8, 8), (9, 32), (28, 28)])
def test_regions_are_symmetric_and_never_empty(name: str, shape: tuple[int, int]) -> None:
    region = region_named(name, shape)
    assert region.shape == shape
    assert bool(region.any())
    assert torch.equal(region, region.flip(0))
    assert torch.equal(region, region.flip(1))


def test_the_corners_cover_the_squares_of_the_decoy_digits() -> None:
    corners = region_named("corners", (3, 28, 28), share=4 / 28)
    assert corners.sum() == 4 * 4 * 4
    assert bool(corners[:4, -4:].all())


def test_the_largest_share_of_each_region_is_the_whole_picture() -> None:
    assert all(
        bool(region_named(name, (8, 6), share=s).all())
        for name, s in (("border", 0.5), ("corners", 0.5), ("center", 1))
    )


def test_a_flat_map_has_the_mass_of_the_area() -> None:
    for name in REGIONS:
        region = region_named(name, (16, 12))
        assert float(mass(torch.ones(1, 16, 12), region)) == pytest.approx(float(region.double().mean()))


def test_what_does_not_fit_is_refused() -> None:
    maps = torch.ones(2, 4, 5)
    with pytest.raises(ValueError, match=r"expected a region \(4, 5\).*\(2, 1, 4, 5\); got \(5, 4\)"):
        mass(maps, torch.ones(5, 4))
    with pytest.raises(ValueError, match=r"\[0, 1\]; got values from 0 to 255. Divide"):
        mass(maps, 255 * torch.eye(5)[:4])
    with pytest.raises(ValueError, match=r"border, corners, center, or a mask; got 'centre'. Did you mean 'center'"):
        region_named("centre", (4, 5))
    with pytest.raises(ValueError, match=r"border takes a share .* at most 0.5, got 0.6"):
        region_named("border", (4, 5), share=0.6)
    with pytest.raises(ValueError, match="needs height and width, got"):
        region_named("border", (4,))
    with pytest.raises(ValueError, match=r"of one input or more, got \(3,\)"):
        concentration(torch.ones(3))
