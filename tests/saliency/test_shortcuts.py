"""Planted shortcuts come first with the right members; where maps lie anywhere, nothing is flagged."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from saliency.planted_maps import SIDE, planted
from scipy.stats import binom
from torch import Tensor

from lightning_robust.randomness import seeded
from lightning_robust.saliency.shortcuts import OUTSIDE, _Look, find_shortcuts, places


def anywhere(kind: str, n: int, seed: int) -> Tensor:
    """Maps without structure: dense noise, noise with few high values, or one square of cells each."""
    noise = torch.rand(n, SIDE, SIDE, generator=seeded(seed))
    if kind != "squares":
        return noise if kind == "dense" else noise**20
    maps = torch.zeros(n, SIDE, SIDE)
    for one, (row, column) in zip(maps, torch.randint(0, SIDE - 1, (n, 2), generator=seeded(seed, 2)), strict=True):
        one[row : row + 2, column : column + 2] = 1
    return maps


def found(maps: Tensor, **settings: Any) -> Any:
    classes = torch.arange(len(maps)) % 3
    return find_shortcuts(maps, classes, classes, **settings)


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_shortcut_comes_first_and_flagged_clusters_hold_its_members(seed: int) -> None:
    maps, stamped = planted(seed)
    flagged = [cluster for cluster in found(maps) if cluster.flagged]
    assert {cluster.place for cluster in flagged} == {"bottom left corner"}
    # Maps that are all alike may fall into two clusters; then both are flagged.
    assert sorted(torch.cat([cluster.members for cluster in flagged]).tolist()) == stamped.nonzero()[:, 0].tolist()


def test_flagged_clusters_come_first_then_the_more_suspicious_ones() -> None:
    order = [(cluster.flagged, cluster.suspicion) for cluster in found(planted(0)[0])]
    assert order == sorted(order, reverse=True)
    assert order[0][0]


@pytest.mark.parametrize("kind", ["dense", "peaked", "squares"])
def test_nothing_is_flagged_where_maps_lie_anywhere(kind: str) -> None:
    for seed in range(12):
        assert not any(cluster.flagged for cluster in found(anywhere(kind, 150, seed)))


def test_one_edge_of_all_samples_is_a_shortcut() -> None:
    maps = 0.002 * torch.rand(60, SIDE, SIDE, generator=seeded(0))
    maps[torch.arange(60), torch.randint(0, SIDE, (60,), generator=seeded(1)), -1] = 1
    clusters = found(maps)
    assert all(cluster.flagged for cluster in clusters)
    assert "right edge" in {cluster.place for cluster in clusters}


def test_every_sample_is_in_one_cluster() -> None:
    clusters = found(planted(0)[0])
    assert sorted(torch.cat([cluster.members for cluster in clusters]).tolist()) == list(range(120))


def test_the_numbers_of_a_cluster_are_means_over_its_members() -> None:
    maps, _ = planted(1)
    labels, predictions = torch.arange(120) % 4, torch.arange(120) % 5
    shares = maps.double() / maps.double().sum((1, 2), keepdim=True)
    for cluster in find_shortcuts(maps, labels, predictions):
        rows = cluster.members
        torch.testing.assert_close(cluster.mean_map, shares[rows].mean(0))
        torch.testing.assert_close(cluster.excess, shares[rows].mean(0) - shares.mean(0))
        assert cluster.error_rate == pytest.approx(float((labels[rows] != predictions[rows]).double().mean()))
        assert dict(cluster.classes) == {k: n for k, n in enumerate(labels[rows].bincount().tolist()) if n}
        assert cluster.mass["border"] == pytest.approx(1 - float(shares[rows, 2:-2, 2:-2].sum((1, 2)).mean()))


def test_what_a_foreground_leaves_out_is_a_place() -> None:
    maps, stamped = planted(2)
    # The shortcut amid the picture, where no place tells it from an object.
    maps = maps.roll((-6, 6), (1, 2)) * stamped[:, None, None] + maps * ~stamped[:, None, None]
    foreground = torch.zeros_like(maps)
    foreground[~stamped] = (maps[~stamped] > 0.5).float()
    foreground[stamped, :4, -4:] = 1
    assert not any(cluster.flagged for cluster in found(maps))
    first, *others = found(maps, foreground=foreground)
    assert (first.flagged, first.place, first.where) == (True, OUTSIDE, OUTSIDE)
    assert first.mass[OUTSIDE] > 0.9
    flagged = torch.cat([first.members, *(cluster.members for cluster in others if cluster.flagged)])
    assert bool(stamped[flagged].all())
    assert len(flagged) >= 20  # of 30: some lie where others rightly look


def test_chance_shifts_every_map_to_everywhere() -> None:
    maps, mask = anywhere("squares", 3, 0).double(), places(SIDE, SIDE)["top edge"]
    shares, even = maps / maps.sum((1, 2), keepdim=True), float(mask.mean())
    look = _Look.of(shares, mask[None])
    shifts = list(itertools.product(range(SIDE), range(SIDE)))
    for one, expected in zip(shares, look.anywhere.tolist(), strict=True):
        there = [float((one.roll(shift, (0, 1)) * mask).sum()) for shift in shifts]
        assert expected == pytest.approx(sum((m - even) / (1 - even) > 0.5 for m in there) / SIDE**2)


def test_chance_is_binomial_where_all_maps_are_alike() -> None:
    for count in (0, 3, 9, 30):
        shares = torch.zeros(30, SIDE, SIDE, dtype=torch.float64)
        shares[:count, 0, 3], shares[count:, 5, 5] = 1, 1
        look = _Look.of(shares, places(SIDE, SIDE)["top edge"][None])
        assert look.chance() == pytest.approx(binom.sf(count - 1, 30, 2 / SIDE), abs=1e-12)


def test_places_are_as_large_as_they_say() -> None:
    sizes = {name: int(mask.sum()) for name, mask in places(14, 28).items()}
    assert sizes["top left corner"] == 2 * 4
    assert sizes["corners"] == 4 * sizes["bottom right corner"]
    assert sizes["left edge"] == 14 * 4
    assert sizes["border"] == 14 * 28 - 10 * 20


def test_empty_maps_are_not_suspicious() -> None:
    assert not any(cluster.flagged for cluster in found(torch.zeros(40, SIDE, SIDE)))


def test_shapes_that_do_not_fit_are_refused() -> None:
    maps, zeros = torch.rand(4, 7, 7), torch.zeros(4)
    with pytest.raises(ValueError, match=r"expected maps \(N, H, W\)"):
        find_shortcuts(maps, zeros[:3], zeros)
    with pytest.raises(ValueError, match="foreground= masks"):
        find_shortcuts(maps, zeros, zeros, foreground=maps[:, :5])
