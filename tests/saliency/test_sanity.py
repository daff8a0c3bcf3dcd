"""Similarities between a null and a floor, and how they tell methods that do not look at weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from saliency.known_nets import methods, trained
from saliency.small_nets import rand
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.saliency import drift, gradcam, gradient, integrated_gradients
from lightning_robust.saliency.permutation import permuted
from lightning_robust.saliency.sanity import insensitive, noise_floor, null_similarity, skill, with_noise


def test_the_null_is_the_similarity_to_maps_under_permuted_weights() -> None:
    net, x, y = trained()
    found = null_similarity(net, methods()["gradient"], x, seed=3)
    with permuted(net, 3):
        other = gradient(net, x, y)
    assert found == {name: float(value.mean()) for name, value in drift(other, gradient(net, x, y)).items()}


def test_the_floor_is_the_similarity_to_maps_of_noisy_inputs() -> None:
    net, x, y = trained()
    other = gradient(net, with_noise(x, seed=3), y)
    found = noise_floor(net, methods()["gradient"], x, seed=3)
    assert found == {name: float(value.mean()) for name, value in drift(other, gradient(net, x, y)).items()}


def test_the_null_of_gradients_is_near_chance_and_far_from_the_floor() -> None:
    net, x, _ = trained()
    null, floor = (measure(net, methods()["gradient"], x) for measure in (null_similarity, noise_floor))
    assert 0.02 < null["iou10"] < 0.2  # chance is .05
    assert floor["iou10"] > 0.6
    assert abs(null["cosine"]) < 0.3
    assert floor["cosine"] > 0.9


def test_on_zero_padded_inputs_the_masked_rank_correlation_has_a_null_far_below_the_plain_one() -> None:
    _, x, y = trained()
    padded = F.pad(x[:, :, 1:7, 1:7], (5,) * 4)  # 16 x 16; maps of integrated gradients are 0 on seven eighths of it
    head = nn.Sequential(nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10))
    maps = integrated_gradients(head, padded, y).abs()
    with permuted(head):
        others = integrated_gradients(head, padded, y).abs()
    pairs = zip(maps.flatten(1).numpy(), others.flatten(1).numpy(), strict=True)
    assert float(np.mean([spearmanr(a, b).statistic for a, b in pairs])) > 0.9
    assert float(drift(maps, others)["spearman"].mean()) < 0.6


def test_maps_of_another_draw_of_noise_have_skill_one_and_those_of_another_permutation_none() -> None:
    net, x, _ = trained()
    for name in ("gradient", "integrated_gradients"):
        explain = methods()[name]
        null, floor = null_similarity(net, explain, x), noise_floor(net, explain, x)
        noisy, forgotten = noise_floor(net, explain, x, seed=1), null_similarity(net, explain, x, seed=1)
        for key in ("iou10", "cosine"):
            assert skill(noisy[key], null[key], floor[key]) == pytest.approx(1, abs=0.1)
            assert skill(forgotten[key], null[key], floor[key]) == pytest.approx(0, abs=0.15)
            assert skill(1.0, null[key], floor[key]) >= 1


def test_skill_is_unknown_where_null_and_floor_are_one() -> None:
    assert skill(0.5, null=0.0, floor=1.0) == 0.5
    for null, floor in ((0.9, 0.94), (0.9, 0.5), (math.nan, 1.0), (0.0, math.nan)):
        assert math.isnan(skill(0.9, null, floor))


@pytest.mark.parametrize(
    ("null", "floor", "verdict"),
    [
        ((0.54, 0.46), (1.0, 0.9), True),  # halfway are 10 / 19 and .45
        ((0.51, 0.46), (1.0, 0.9), False),
        ((0.54, 0.44), (1.0, 0.9), False),
        ((1.0, 1.0), (0.1, 0.9), False),  # this floor is as good as chance
        ((1.0, 1.0), (1.0, 0.04), False),
        ((math.nan, 1.0), (1.0, 1.0), False),
        ((1.0, 1.0), (1.0, math.nan), False),
    ],
)
def test_insensitive_is_what_has_both_similarities_beyond_halfway_from_chance_to_the_floor(
    null: tuple[float, float], floor: tuple[float, float], verdict: bool
) -> None:
    names = ("iou10", "cosine")
    assert insensitive(dict(zip(names, null, strict=True)), dict(zip(names, floor, strict=True))) is verdict


@pytest.mark.parametrize(("name", "verdict"), [("gradient", False), ("integrated_gradients", False), ("edges", True)])
def test_null_and_floor_of_a_method_tell_whether_it_looks_at_the_weights(name: str, verdict: bool) -> None:
    net, x, _ = trained()
    explain = methods()[name]
    assert insensitive(null_similarity(net, explain, x), noise_floor(net, explain, x)) is verdict


def test_a_method_is_blamed_for_samples_whose_maps_are_empty() -> None:
    net, x, y = trained()
    filled = methods()["gradcam"](x).flatten(1).amax(1) > 0

    def blamed(rows: Tensor) -> bool:
        def explain(x: Tensor) -> Tensor:
            return gradcam(net, x, y[rows], net[5])

        return insensitive(null_similarity(net, explain, x[rows]), noise_floor(net, explain, x[rows]))

    assert blamed(torch.ones_like(filled))
    assert not blamed(filled)


def test_noise_is_a_share_of_the_range_and_belongs_to_the_sample() -> None:
    x = 10 * rand(6, 3, 20, 20) - 5
    noise = with_noise(x, noise=0.1) - x
    assert float(noise.std()) == pytest.approx(0.1 * float(x.max() - x.min()), rel=0.03)
    assert torch.equal(with_noise(x[:2], spread=10.0), with_noise(x, spread=10.0)[:2])
    assert not torch.equal(with_noise(x, seed=1), with_noise(x))
    with pytest.raises(ValueError, match=r"must be above 0, a share of the range such as 0.02; got 0"):
        with_noise(x, noise=0)


def test_columns_of_a_table_have_ranges_of_their_own() -> None:
    x = rand(500, 2) * torch.tensor([1.0, 1000.0])
    assert (with_noise(x) - x).std(0).tolist() == pytest.approx([0.02, 20.0], rel=0.1)


def test_a_method_that_draws_from_the_global_stream_draws_the_same_each_time() -> None:
    net, x, _ = trained()
    assert noise_floor(net, lambda x: torch.rand(x[:, 0].shape), x)["iou10"] == 1


def test_all_works_in_inference_mode() -> None:
    net, x, y = trained()
    expected = null_similarity(net, methods()["gradient"], x)
    with torch.inference_mode():
        found = null_similarity(net, lambda x: gradient(net, x, y), x.clone())
    assert found == expected
