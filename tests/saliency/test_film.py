"""A film of any length keeps its first and its last two snapshots, a few in between, and tells how far maps moved."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from torch import Tensor

from lightning_robust.saliency import Film, drift, quantised

NAMES = ("iou10", "cosine", "spearman", "ssim", "centre_shift")


def snapshots(n: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 5, 5, generator=generator) for _ in range(n)]


def filmed(maps: list[Tensor]) -> Film:
    film = Film()
    for number, snapshot in enumerate(maps):
        film.add(str(number), snapshot)
    return film


def test_drift_is_measured_to_the_first_and_to_the_one_before_in_eight_bits() -> None:
    maps, film = snapshots(12), Film()
    for i, now in enumerate(maps):
        moved = film.add(str(i), now)
        for since, earlier in (("anchor", maps[0]), ("previous", maps[max(i - 1, 0)])):
            expected = drift(quantised(now).maps(), quantised(earlier).maps())
            for name, values in expected.items():
                assert moved[f"{name}_to_{since}"] == float(values.mean())
        assert len(moved) == 10
    assert len(film) == 12


def test_the_first_snapshot_and_one_that_is_repeated_have_not_moved() -> None:
    (first,) = snapshots(1)
    film = Film()
    for caption in ("first", "again"):
        moved = film.add(caption, first)
        assert moved.keys() == {f"{name}_to_{since}" for name in NAMES for since in ("anchor", "previous")}
        assert all(value == (0 if "centre" in name else 1) for name, value in moved.items())


def test_skills_are_nil_at_the_null_one_at_the_floor_and_in_between_in_proportion() -> None:
    anchor, null, noisy, now = snapshots(4)
    noisy = anchor + 0.05 * noisy
    film = Film()
    assert film.skills(film.add("first", anchor)) == {}
    film.calibrate(null, noisy)
    for maps, expected in ((null, 0.0), (noisy, 1.0)):
        other = Film.from_dict(film.to_dict())
        found = other.skills(other.add("now", maps))
        assert found["iou10_skill_to_anchor"] == pytest.approx(expected)
        assert found["cosine_skill_to_previous"] == pytest.approx(expected)
    moved = film.add("now", 0.5 * anchor + 0.5 * now)
    found = film.skills(moved)
    for name in ("iou10", "cosine", "spearman", "ssim"):
        low, high = found[f"{name}_null"], found[f"{name}_floor"]
        assert found[f"{name}_skill_to_anchor"] == pytest.approx((moved[f"{name}_to_anchor"] - low) / (high - low))
    assert not any("centre" in name for name in found)


def test_maps_come_back_within_half_a_step_of_eight_bits() -> None:
    maps = snapshots(2)
    (_, first), (_, now) = filmed(maps).shown()
    for found, exact in ((first, maps[0]), (now, maps[1])):
        step = exact.abs().flatten(1).amax(1) / 32767
        assert bool(((found - exact).abs().flatten(1).amax(1) <= 0.5 * step + 1e-7).all())


@pytest.mark.parametrize(
    ("n", "captions"),
    [
        (0, []),
        (1, ["first: 0"]),
        (2, ["first: 0", "now: 1"]),
        (3, ["first: 0", "previous: 1", "now: 2"]),
        (4, ["first: 0", "1", "previous: 2", "now: 3"]),
        (5, ["first: 0", "1", "2", "previous: 3", "now: 4"]),
    ],
)
def test_a_short_film_shows_everything_in_order(n: int, captions: list[str]) -> None:
    shown = filmed(snapshots(n)).shown()
    assert [caption for caption, _ in shown] == captions
    for (_, found), maps in zip(shown, snapshots(n), strict=True):
        assert torch.equal(found, quantised(maps).maps())


@pytest.mark.parametrize("n", [6, 7, 10, 17, 64, 65, 200, 1000])
def test_a_long_film_keeps_little_spread_evenly_and_every_map_with_its_own_caption(n: int) -> None:
    maps = snapshots(n)
    film = filmed(maps)
    kept = film.to_dict()["kept"]
    assert len(film) == n
    assert len(kept) <= 7
    shown = film.shown()
    assert len(shown) == 5
    assert [c for c, _ in shown][::4] == ["first: 0", f"now: {n - 1}"]
    assert shown[3][0] == f"previous: {n - 2}"
    numbers = [row["number"] for row in kept]
    assert numbers[0] == 0
    assert numbers[-2:] == [n - 2, n - 1]
    assert numbers == sorted(set(numbers))
    between = numbers[1:-2]
    gaps = {b - a for a, b in itertools.pairwise(between)}
    assert len(gaps) <= 1  # every second, every fourth, ...
    assert all(gap & (gap - 1) == 0 for gap in gaps)
    for caption, found in shown:
        assert torch.equal(found, quantised(maps[int(caption.split()[-1])]).maps())


def test_snapshots_between_cover_the_run() -> None:
    film, (maps,) = Film(), snapshots(1)
    for n in range(1, 400):
        film.add(str(n - 1), maps)
        if n >= 6:
            numbers = [int(caption.split()[-1]) for caption, _ in film.shown()]
            assert len(set(numbers)) == 5
            # At about a third and two thirds of the time, as well as what is kept allows.
            assert abs(numbers[1] - n / 3) <= n / 6
            assert abs(numbers[2] - 2 * n / 3) <= n / 6


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 9, 40])
def test_a_film_from_a_checkpoint_goes_on_as_if_it_had_not_been_cut(cut: int) -> None:
    maps = snapshots(70)
    whole, film = filmed(maps), filmed(maps[:cut])
    file = io.BytesIO()
    torch.save(film.to_dict(), file)
    file.seek(0)
    resumed = Film.from_dict(torch.load(file, weights_only=True))
    assert len(resumed) == cut
    reference = filmed(maps[:cut])
    for number in range(cut, 70):
        assert resumed.add(str(number), maps[number]) == reference.add(str(number), maps[number])
    assert [c for c, _ in resumed.shown()] == [c for c, _ in whole.shown()]
    for (_, a), (_, b) in zip(resumed.shown(), whole.shown(), strict=True):
        assert torch.equal(a, b)


def test_maps_of_tables_are_filmed_too_and_empty_ones_have_not_moved() -> None:
    film = Film()
    film.add("a", torch.zeros(2, 7))
    assert film.add("b", torch.zeros(2, 7))["iou10_to_anchor"] == 1
    assert film.shown()[-1][1].shape == (2, 7)


def test_what_a_film_keeps_is_its_own() -> None:
    maps = torch.ones(1, 2, 2)
    film = Film()
    film.add("a", maps)
    maps.zero_()
    assert float(film.shown()[0][1].sum()) == pytest.approx(4)
