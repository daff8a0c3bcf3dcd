from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from lightning_robust.randomness import (
    RandomState,
    normal,
    priorities,
    reseed,
    seeded,
    uniform,
    untouched_random_state,
)

DRAWS: list[Callable[..., Tensor]] = [uniform, normal]


def draw_from_all_streams() -> tuple[list[float], float, float]:
    return torch.rand(3).tolist(), float(np.random.rand()), random.random()


def test_a_seeded_stream_is_a_function_of_its_keys() -> None:
    torch.rand(5)
    first = torch.rand(8, generator=seeded(3, 1, 4))
    torch.manual_seed(99)
    assert torch.equal(first, torch.rand(8, generator=seeded(3, 1, 4)))


def test_keys_of_numpy_and_torch_are_the_whole_numbers_that_they_stand_for() -> None:
    expected = torch.rand(8, generator=seeded(5, 7))
    for key in (np.int64(5), torch.tensor(5)):
        assert torch.equal(expected, torch.rand(8, generator=seeded(key, 7)))  # type: ignore[arg-type]  # as users have it
    assert torch.equal(priorities(torch.arange(9), np.int64(3)), priorities(torch.arange(9), 3))  # type: ignore[arg-type]  # likewise


def test_neighbouring_keys_give_different_streams() -> None:
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (10, 1), (1, 10), (-1,), (2**80,)]
    firsts = {float(torch.rand(1, generator=seeded(*k), dtype=torch.float64)) for k in keys}
    assert len(firsts) == len(keys)


def test_streams_of_neighbouring_keys_are_uncorrelated() -> None:
    rows = torch.stack([torch.randn(20_000, generator=seeded(0, step)) for step in range(6)])
    off_diagonal = torch.corrcoef(rows) - torch.eye(6)
    assert float(off_diagonal.abs().max()) < 5 / 20_000**0.5


@pytest.mark.parametrize("draw", DRAWS)
def test_noise_of_a_sample_does_not_depend_on_its_batch(draw: Callable[..., Tensor]) -> None:
    x = torch.zeros(10, 3, 4)
    whole = draw(x, [seeded(0, i) for i in range(10)])
    parts = [draw(x[:4], [seeded(0, i) for i in range(4)]), draw(x[4:], tuple(seeded(0, i) for i in range(4, 10)))]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("draw", DRAWS)
def test_noise_has_the_shape_and_type_of_its_model(draw: Callable[..., Tensor]) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for like in (torch.zeros(2, 3, dtype=dtype), torch.zeros(0, 3, dtype=dtype)):
            for noise in (None, seeded(0), [seeded(0, i) for i in range(len(like))]):
                drawn = draw(like, noise)
                assert drawn.shape == like.shape
                assert drawn.dtype == dtype


def test_one_generator_too_few_is_an_error() -> None:
    with pytest.raises(ValueError, match="one generator per sample, got 2 for 3 samples"):
        uniform(torch.zeros(3, 2), [seeded(0), seeded(1)])


@pytest.mark.parametrize("per_sample", [False, True])
def test_uniform_and_normal_have_their_moments(per_sample: bool) -> None:
    like = torch.zeros(100, 1000, dtype=torch.float64)
    noise = [seeded(7, i) for i in range(100)] if per_sample else seeded(7)
    n, u = like.numel(), uniform(like, noise)
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert float(u.mean()) == pytest.approx(1 / 2, abs=5 * (1 / 12 / n) ** 0.5)
    assert float(u.var()) == pytest.approx(1 / 12, abs=5 * (1 / 180 / n) ** 0.5)
    z = normal(like, noise)
    assert float(z.mean()) == pytest.approx(0, abs=5 * (1 / n) ** 0.5)
    assert float(z.var()) == pytest.approx(1, abs=5 * (2 / n) ** 0.5)
    assert float((z**4).mean()) == pytest.approx(3, abs=5 * (96 / n) ** 0.5)


def test_our_own_noise_leaves_the_global_streams_alone() -> None:
    reseed(1)
    expected = draw_from_all_streams()
    reseed(1)
    uniform(torch.zeros(9, 9), seeded(0))
    normal(torch.zeros(9, 9), [seeded(0, i) for i in range(9)])
    assert draw_from_all_streams() == expected


def test_all_three_streams_go_on_as_if_nothing_had_been_drawn() -> None:
    reseed(5)
    expected = draw_from_all_streams()
    reseed(5)
    with untouched_random_state():
        reseed(123)
        draw_from_all_streams()
    assert draw_from_all_streams() == expected


def test_all_three_streams_go_on_after_an_exception_too() -> None:
    reseed(5)
    expected = draw_from_all_streams()
    reseed(5)
    with pytest.raises(ZeroDivisionError), untouched_random_state():
        _ = sum(draw_from_all_streams()[0]) / 0
    assert draw_from_all_streams() == expected


def test_a_captured_state_can_be_replayed() -> None:
    state = RandomState.capture()
    first = draw_from_all_streams()
    state.restore()
    assert draw_from_all_streams() == first


# -- priorities ------------------------------------------------------------------------------------------------------

KEYS: dict[str, Tensor] = {
    "in a row": torch.arange(100_000),
    "far apart": torch.arange(100_000) << 24,
    "pixels of pictures": (torch.arange(100)[:, None] * 2**24 + torch.arange(1000)).flatten(),
    "negative": -torch.arange(1, 100_001),
    "large": torch.arange(2**62, 2**62 + 100_000),
}


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS.keys())
def test_priorities_are_uniform_and_all_different(keys: Tensor) -> None:
    found = priorities(keys, 0)
    assert found.dtype == torch.float64
    assert float(found.min()) >= 0
    assert float(found.max()) < 1
    assert len(found.unique()) == len(keys)
    assert kstest(found.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS.keys())
def test_priorities_of_neighbouring_keys_and_seeds_are_unrelated(keys: Tensor) -> None:
    base = priorities(keys, 0)
    others = [priorities(keys + 1, 0), priorities(keys, 1), priorities(keys, -1), priorities(keys, 2**70)]
    off_diagonal = torch.corrcoef(torch.stack([base, *others])) - torch.eye(5, dtype=torch.float64)
    assert float(off_diagonal.abs().max()) < 5 / len(keys) ** 0.5


def test_a_priority_is_a_function_of_seed_and_key_alone() -> None:
    keys = torch.arange(1000)
    whole = priorities(keys, 7)
    order = torch.randperm(1000)
    assert torch.equal(priorities(keys[order], 7), whole[order])
    assert torch.equal(torch.cat([priorities(part, 7) for part in keys.split(13)]), whole)
    assert torch.equal(priorities(keys.int(), 7), whole)
    assert not torch.equal(priorities(keys, 8), whole)
    assert len(priorities(keys[:0], 7)) == 0


def test_priorities_are_the_same_numbers_in_years_to_come() -> None:
    """SplitMix64, once more, in Python's own integers: checkpoints of two versions keep the same samples."""
    import hashlib

    def by_hand(key: int, seed: int) -> float:
        start = int.from_bytes(hashlib.blake2b(repr(seed).encode(), digest_size=8).digest(), "little")
        z = (key * 0x9E3779B97F4A7C15 + start) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return ((z ^ (z >> 31)) >> 11) / 2**53

    keys = [0, 1, 2, 2**24, 2**40 + 3, 2**62]
    assert priorities(torch.tensor(keys), 3).tolist() == [by_hand(key, 3) for key in keys]


def test_priorities_leave_the_global_streams_alone() -> None:
    state = RandomState.capture()
    priorities(torch.arange(100), 0)
    assert state.is_current()
