"""Drift in closed form, against numpy, scipy and scikit-image, and after a trip through 16 bits."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_robust.randomness import seeded
from lightning_robust.saliency import QuantisedMaps, drift, quantised
from lightning_robust.saliency.drift import ranks

UNMOVED = {"iou10": 1.0, "cosine": 1.0, "spearman": 1.0, "ssim": 1.0, "centre_shift": 0.0}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def bars(*starts: int, width: int = 10) -> Tensor:
    """Maps of 100 inputs that are 1 on ten of them in a row, 0 elsewhere."""
    maps = torch.zeros(len(starts), 100)
    for row, start in enumerate(starts):
        maps[row, start : start + width] = 1
    return maps.view(-1, 10, 10)


def test_identical_disjoint_and_half_shifted_maps_have_the_overlap_that_one_can_count() -> None:
    found = drift(bars(0, 0, 0), bars(0, 50, 5))
    assert found["iou10"].tolist() == [1.0, 0.0, 5 / 15]
    # Bars of share .1: covariance (shared share) - .01, variance .09.
    assert found["cosine"].tolist() == pytest.approx([1.0, -0.01 / 0.09, (0.05 - 0.01) / 0.09])


def test_the_cosine_is_pearsons_correlation_of_each_sample() -> None:
    a, b = noise(5, 6, 7), noise(5, 6, 7, seed=1) + noise(5, 6, 7)
    expected = [np.corrcoef(x.flatten().double(), y.flatten().double())[0, 1] for x, y in zip(a, b, strict=True)]
    assert drift(a, b)["cosine"].tolist() == pytest.approx(expected, abs=1e-12)


def test_the_overlap_is_that_of_sets_of_the_largest_tenth() -> None:
    a, b = noise(5, 99), noise(5, 99, seed=1) + noise(5, 99)
    for x, y, found in zip(a, b, drift(a, b)["iou10"].tolist(), strict=True):
        one, other = (set(np.argsort(-np.abs(m.numpy()))[:10].tolist()) for m in (x, y))  # 9.9, rounded up
        assert found == len(one & other) / len(one | other)


def sparse(*shape: int, seed: int = 0) -> Tensor:
    """Maps of a method that is 0 wherever the input is: on three quarters of the inputs, the same for every seed."""
    return noise(*shape, seed=seed) * (torch.rand(shape, generator=seeded(99)) < 0.25)


def test_the_rank_correlation_is_scipys_over_the_inputs_that_are_not_zero_in_both() -> None:
    a = torch.cat([noise(5, 8, 9), sparse(5, 8, 9).abs(), (2 * sparse(5, 8, 9)).round()])
    b = torch.cat([noise(5, 8, 9, seed=1) + noise(5, 8, 9), sparse(5, 8, 9, seed=1), noise(5, 8, 9).round()])
    for x, y, found in zip(a.flatten(1), b.flatten(1), drift(a, b)["spearman"].tolist(), strict=True):
        among = ((x != 0) | (y != 0)).numpy()
        assert found == pytest.approx(spearmanr(x.numpy()[among], y.numpy()[among]).statistic, abs=1e-12)


def test_shared_zeros_make_unrelated_maps_look_alike_to_a_plain_rank_correlation_only() -> None:
    a, b = sparse(50, 16, 16).abs(), sparse(50, 16, 16, seed=1).abs()
    plain = [spearmanr(x.numpy(), y.numpy()).statistic for x, y in zip(a.flatten(1), b.flatten(1), strict=True)]
    assert float(np.mean(plain)) > 0.9
    assert abs(float(drift(a, b)["spearman"].mean())) < 0.05


def test_the_rank_correlation_sees_order_alone() -> None:
    a = noise(5, 40).abs()
    assert drift(a, a.exp() - 1)["spearman"].tolist() == [1.0] * 5
    assert drift(a, 1 / a)["spearman"].tolist() == [-1.0] * 5


def test_ranks_of_ties_are_shared() -> None:
    assert ranks(torch.tensor([[3.0, 1, 3, 3, 0], [2.0] * 5])).tolist() == [[4.0, 2, 4, 4, 1], [3.0] * 5]


def drawn(image: Tensor) -> np.ndarray:
    """Divided by the 99th percentile (the last of the hundredth that is largest) and cut."""
    size = np.sort(np.abs(image.double().numpy()), axis=None)
    return np.clip(image.double().numpy() / size[-int(np.ceil(size.size / 100))], -1, 1)


@pytest.mark.parametrize(
    ("height", "width", "window"), [(32, 32, 7), (28, 40, 7), (7, 9, 7), (6, 30, 5), (8, 4, 3), (3, 3, 3)]
)
def test_the_structural_similarity_is_that_of_scikit_image(height: int, width: int, window: int) -> None:
    a = torch.cat([noise(3, height, width), 50 * noise(3, height, width).abs(), sparse(2, height, width)])
    b = a + 0.7 * noise(8, height, width, seed=1)
    found = drift(a, b / 1024)["ssim"].tolist()
    for x, y, value in zip(a, b, found, strict=True):
        expected = structural_similarity(drawn(x), drawn(y), win_size=window, data_range=1.0)
        assert value == pytest.approx(expected, abs=1e-12)


def test_an_outlier_does_not_make_maps_structurally_alike() -> None:
    """A scale by the maximum would press all else into a flat grey, and flat greys are alike."""
    a, b = noise(20, 32, 32).abs(), noise(20, 32, 32, seed=1).abs()
    spiked_a, spiked_b = a.clone(), b.clone()
    spiked_a[:, 5, 5] = spiked_b[:, 5, 5] = 1000
    rise = drift(spiked_a, spiked_b)["ssim"] - drift(a, b)["ssim"]
    assert float(rise.abs().max()) < 0.1


def test_the_centre_moves_by_as_many_pixels_as_the_map() -> None:
    spot = torch.zeros(1, 20, 30)
    spot[0, 4:7, 5:9] = -torch.rand(3, 4, generator=seeded(0))
    for rows, columns in ((3, 4), (0, 7), (12, -5)):
        moved = drift(spot, spot.roll((rows, columns), (1, 2)))["centre_shift"]
        assert float(moved) == pytest.approx((rows**2 + columns**2) ** 0.5)


def test_the_centre_of_an_empty_map_is_the_middle() -> None:
    corner = torch.zeros(1, 5, 9)
    corner[0, 0, 0] = 1
    for flat in (torch.zeros(1, 5, 9), torch.ones(1, 5, 9)):
        assert float(drift(flat, corner)["centre_shift"]) == pytest.approx((2**2 + 4**2) ** 0.5)


def test_what_needs_a_picture_is_left_out_elsewhere() -> None:
    assert set(drift(noise(2, 9, 9), noise(2, 9, 9))) == set(UNMOVED)
    assert set(UNMOVED) - set(drift(noise(2, 2, 9), noise(2, 2, 9))) == {"ssim"}  # no window fits
    for shape in ((2, 30), (2, 4, 5, 6)):
        assert set(UNMOVED) - set(drift(noise(*shape), noise(*shape))) == {"ssim", "centre_shift"}


def test_unrelated_noise_overlaps_by_chance_in_one_of_nineteen() -> None:
    found = drift(noise(2000, 100), noise(2000, 100, seed=1))
    # Two tenths share a hundredth, and cover .19 together; a mean of ratios lies a little above the ratio of means.
    assert float(found["iou10"].mean()) == pytest.approx(0.01 / 0.19, abs=0.004)
    assert float(found["cosine"].mean()) == pytest.approx(0, abs=0.01)
    assert float(found["spearman"].mean()) == pytest.approx(0, abs=0.01)


def test_no_number_depends_on_scale_and_the_overlap_not_on_sign() -> None:
    a, b = noise(4, 5, 10), noise(4, 5, 10, seed=1)
    for name, value in drift(a, b).items():
        torch.testing.assert_close(drift(1000 * a, b / 1000)[name], value)
    assert torch.equal(drift(-a, b)["iou10"], drift(a, b)["iou10"])
    for name in ("cosine", "spearman"):
        torch.testing.assert_close(drift(-a, b)[name], -drift(a, b)[name])


def test_ties_at_the_threshold_are_in_as_a_whole_and_zeros_never_are() -> None:
    flat, step = torch.ones(1, 20), torch.cat([torch.ones(1, 5), torch.zeros(1, 15)], 1)
    assert float(drift(flat, step)["iou10"]) == 5 / 20
    one = torch.zeros(1, 20)
    one[0, 0] = 3  # a tenth would be two inputs, but only one is there
    assert float(drift(one, step)["iou10"]) == 1 / 5


def test_constant_maps_are_alike_and_unlike_all_others() -> None:
    zeros, flat, rough = torch.zeros(1, 30), torch.full((1, 30), 0.1), noise(1, 30)
    both, neither = {"iou10": 1.0, "cosine": 1.0, "spearman": 1.0}, {"iou10": 0.0, "cosine": 0.0, "spearman": 0.0}
    for a, b, expected in (
        *((zeros, zeros, both), (flat, flat, both), (zeros, rough, neither)),
        *((zeros, flat, {**both, "iou10": 0.0}), (flat, rough, {**neither, "iou10": 0.1})),
    ):
        for x, y in ((a, b), (b, a)):
            assert {name: pytest.approx(float(value)) for name, value in drift(x, y).items()} == expected


def test_tiny_and_huge_maps_count_like_others_and_broken_ones_are_marked() -> None:
    a, b = noise(3, 5, 8), noise(3, 5, 8, seed=1)
    for name, value in drift(a * 1e-37, b * 1e37).items():
        torch.testing.assert_close(value, drift(a, b)[name], rtol=1e-5, atol=1e-5)
    a[0, 3, 3], b[1, 0, 0] = torch.nan, torch.inf
    for x, y in ((a, b), (b, a)):
        found = drift(x, y)
        assert set(found) == set(UNMOVED)
        assert all(value.isnan().tolist() == [True, True, False] for value in found.values())


def test_maps_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"of one shape, got \(2, 4, 4\) and \(2, 16\)"):
        drift(torch.zeros(2, 4, 4), torch.zeros(2, 16))
    with pytest.raises(ValueError, match=r"\(N, ...\)"):
        drift(torch.zeros(4), torch.zeros(4))


def test_eight_bits_are_off_by_half_a_step_at_most_and_each_sample_has_its_own_scale() -> None:
    maps = noise(6, 5, 5) * torch.logspace(-20, 20, 6).view(-1, 1, 1)
    stored = quantised(maps)
    assert stored.values.dtype == torch.int16
    assert stored.values.abs().flatten(1).amax(1).tolist() == [32767] * 6
    step = maps.abs().flatten(1).amax(1) / 32767
    assert bool(((stored.maps() - maps).abs() <= 0.5001 * step.view(-1, 1, 1)).all())


def test_a_stored_map_has_not_drifted_from_itself_at_all() -> None:
    maps = torch.cat([noise(50, 9, 9), noise(50, 9, 9).abs() * 1e-9, torch.zeros(1, 9, 9), torch.ones(1, 9, 9)])
    stored = quantised(maps)
    for again in (stored, quantised(maps.clone()), quantised(stored.maps())):
        found = drift(stored.maps(), again.maps())
        assert {name: value.unique().tolist() for name, value in found.items()} == {k: [v] for k, v in UNMOVED.items()}


def test_storage_hardly_changes_drift() -> None:
    a, b = noise(20, 28, 28).abs(), (noise(20, 28, 28) + noise(20, 28, 28, seed=1)).abs()
    exact, stored = drift(a, b), drift(quantised(a).maps(), quantised(b).maps())
    # A step is about 4 / 127, its rounding error .009 against values that spread by .6: two maps of 784 inputs each
    # shake the correlation by sqrt(2) * .009 / .6 / 28 = .00076. Four times that is never seen in 20 samples.
    assert float((exact["cosine"] - stored["cosine"]).abs().max()) < 4 * 0.00076
    assert float((exact["iou10"] - stored["iou10"]).abs().max()) < 0.05
    for name in ("spearman", "ssim"):
        assert float((exact[name] - stored[name]).abs().max()) < 0.01
    assert float((exact["centre_shift"] - stored["centre_shift"]).abs().max()) < 0.01  # of a pixel


def test_stored_maps_travel_in_a_checkpoint_of_plain_tensors() -> None:
    stored = quantised(noise(3, 4, 4))
    file = io.BytesIO()
    torch.save(stored.to_dict(), file)
    file.seek(0)
    back = QuantisedMaps.from_dict(torch.load(file, weights_only=True))
    assert torch.equal(back.values, stored.values)
    assert torch.equal(back.maps(), stored.maps())


def test_a_map_of_zeros_stays_one_and_a_broken_one_comes_back_broken() -> None:
    maps = torch.stack([torch.zeros(4), torch.tensor([1.0, torch.nan, 2.0, 0.0]), torch.tensor([1.0, torch.inf, 2, 0])])
    back = quantised(maps).maps()
    assert torch.equal(back[0], torch.zeros(4))
    assert bool(back[1:].isnan().all())


def test_nothing_becomes_double_before_it_is_on_the_cpu() -> None:
    """Some devices (MPS) have no float64."""
    doubled: list[str] = []

    class Watching(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (Tensor.double, Tensor.cpu):
                doubled.append(f"{func.__name__} {args[0].dtype}")
            return func(*args, **(kwargs or {}))

    maps = torch.rand(2, 3, 4)
    for function in (lambda: drift(maps, maps), lambda: quantised(maps)):
        doubled.clear()
        with Watching():
            function()
        assert doubled[:2] == ["cpu torch.float32", "double torch.float32"]


def test_what_is_kept_of_peaked_maps_ranks_as_they_do() -> None:
    """Maps with a bright spot on a dim ground: in 8 bits the ground would be one tie."""
    generator = torch.Generator().manual_seed(0)
    a, b = ((1.5 * torch.randn(6, 32, 32, generator=generator)).exp() for _ in range(2))
    exact, kept = drift(a, b), drift(quantised(a).maps(), quantised(b).maps())
    for name, tolerance in (("iou10", 1e-3), ("spearman", 2e-3), ("cosine", 1e-4), ("ssim", 1e-3)):
        assert float((exact[name] - kept[name]).abs().max()) < tolerance
