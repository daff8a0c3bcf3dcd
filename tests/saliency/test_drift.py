"""Drift in closed form, against numpy, and after a trip through 8 bits."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_robust.randomness import seeded
from lightning_robust.saliency import QuantisedMaps, drift, quantised


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


def test_unrelated_noise_overlaps_by_chance_in_one_of_nineteen() -> None:
    found = drift(noise(2000, 100), noise(2000, 100, seed=1))
    # Two tenths share a hundredth, and cover .19 together; a mean of ratios lies a little above the ratio of means.
    assert float(found["iou10"].mean()) == pytest.approx(0.01 / 0.19, abs=0.004)
    assert float(found["cosine"].mean()) == pytest.approx(0, abs=0.01)


def test_neither_number_depends_on_scale_and_the_overlap_not_on_sign() -> None:
    a, b = noise(4, 50), noise(4, 50, seed=1)
    for name, value in drift(a, b).items():
        torch.testing.assert_close(drift(1000 * a, b / 1000)[name], value)
    assert torch.equal(drift(-a, b)["iou10"], drift(a, b)["iou10"])
    torch.testing.assert_close(drift(-a, b)["cosine"], -drift(a, b)["cosine"])


def test_ties_at_the_threshold_are_in_as_a_whole_and_zeros_never_are() -> None:
    flat, step = torch.ones(1, 20), torch.cat([torch.ones(1, 5), torch.zeros(1, 15)], 1)
    assert float(drift(flat, step)["iou10"]) == 5 / 20
    one = torch.zeros(1, 20)
    one[0, 0] = 3  # a tenth would be two inputs, but only one is there
    assert float(drift(one, step)["iou10"]) == 1 / 5


def test_constant_maps_are_alike_and_unlike_all_others() -> None:
    zeros, flat, rough = torch.zeros(1, 30), torch.full((1, 30), 0.1), noise(1, 30)
    both = {"iou10": 1.0, "cosine": 1.0}
    for a, b, expected in (
        *((zeros, zeros, both), (flat, flat, both), (zeros, rough, {"iou10": 0.0, "cosine": 0.0})),
        *((zeros, flat, {"iou10": 0.0, "cosine": 1.0}), (flat, rough, {"iou10": 0.1, "cosine": 0.0})),
    ):
        for x, y in ((a, b), (b, a)):
            assert {name: pytest.approx(float(value)) for name, value in drift(x, y).items()} == expected


def test_tiny_and_huge_maps_count_like_others_and_broken_ones_are_marked() -> None:
    a, b = noise(2, 40), noise(2, 40, seed=1)
    for name, value in drift(a * 1e-37, b * 1e37).items():
        torch.testing.assert_close(value, drift(a, b)[name], rtol=1e-5, atol=1e-5)
    a[0, 3] = torch.nan
    assert [value.isnan().tolist() for value in drift(a, b).values()] == [[True, False]] * 2


def test_maps_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"of one shape, got \(2, 4, 4\) and \(2, 16\)"):
        drift(torch.zeros(2, 4, 4), torch.zeros(2, 16))
    with pytest.raises(ValueError, match=r"\(N, ...\)"):
        drift(torch.zeros(4), torch.zeros(4))


def test_eight_bits_are_off_by_half_a_step_at_most_and_each_sample_has_its_own_scale() -> None:
    maps = noise(6, 5, 5) * torch.logspace(-20, 20, 6).view(-1, 1, 1)
    stored = quantised(maps)
    assert stored.values.dtype == torch.int8
    assert stored.values.abs().flatten(1).amax(1).tolist() == [127] * 6
    step = maps.abs().flatten(1).amax(1) / 127
    assert bool(((stored.maps() - maps).abs() <= 0.5001 * step.view(-1, 1, 1)).all())


def test_a_stored_map_has_not_drifted_from_itself_at_all() -> None:
    maps = torch.cat([noise(50, 9, 9), noise(50, 9, 9).abs() * 1e-9, torch.zeros(1, 9, 9), torch.ones(1, 9, 9)])
    stored = quantised(maps)
    for again in (stored, quantised(maps.clone()), quantised(stored.maps())):
        assert all(bool((value == 1).all()) for value in drift(stored.maps(), again.maps()).values())


def test_storage_hardly_changes_drift() -> None:
    a, b = noise(20, 28, 28).abs(), (noise(20, 28, 28) + noise(20, 28, 28, seed=1)).abs()
    exact, stored = drift(a, b), drift(quantised(a).maps(), quantised(b).maps())
    # A step is about 4 / 127, its rounding error .009 against values that spread by .6: two maps of 784 inputs each
    # shake the correlation by sqrt(2) * .009 / .6 / 28 = .00076. Four times that is never seen in 20 samples.
    assert float((exact["cosine"] - stored["cosine"]).abs().max()) < 4 * 0.00076
    assert float((exact["iou10"] - stored["iou10"]).abs().max()) < 0.05


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
