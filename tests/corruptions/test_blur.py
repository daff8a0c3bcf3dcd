"""Blurs keep flat pictures flat, and each does what its name says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Generator, Tensor

from lightning_robust.corruptions.blur import defocus_blur, gaussian_blur, glass_blur, motion_blur, zoom_blur
from lightning_robust.randomness import seeded

Blur = Callable[[Tensor, tuple[float, ...], Sequence[Generator]], Tensor]
BLURS: list[tuple[Blur, tuple[float, ...]]] = [
    (gaussian_blur, (2.0,)),
    (defocus_blur, (3.0, 0.5)),
    (motion_blur, (6.0, 2.0)),
    (zoom_blur, (11.0, 0.02)),
    (glass_blur, (0.7, 2.0, 2.0)),
]


@pytest.mark.parametrize(("blur", "parameters"), BLURS)
def test_a_flat_picture_stays_flat(blur: Blur, parameters: tuple[float, ...]) -> None:
    x = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1).expand(2, 3, 24, 31)
    torch.testing.assert_close(blur(x, parameters, [seeded(0), seeded(1)]), x.contiguous())


def test_defocus_spreads_a_point_over_a_disc() -> None:
    x = torch.zeros(1, 1, 31, 31)
    x[0, 0, 15, 15] = 1
    made = defocus_blur(x, (6.0, 0.1), [seeded(0)])[0, 0]
    steps = torch.arange(-15, 16)
    disc = (steps[:, None] ** 2 + steps**2 <= 36).float()
    torch.testing.assert_close(made, disc / disc.sum(), atol=1e-6, rtol=0)


def test_motion_follows_a_line_within_45_degrees_of_the_rows() -> None:
    x = torch.zeros(50, 1, 41, 41)
    x[..., 20, 20] = 1
    made = motion_blur(x, (6.0, 100.0), [seeded(i) for i in range(50)])[:, 0]
    lit = made > 0
    assert bool((lit.sum((1, 2)) >= 9).all())
    rows, columns = lit.any(2).sum(1), lit.any(1).sum(1)
    assert bool((rows <= columns).all())
    assert len({int(r) for r in rows}) > 3  # not all in one direction


def test_a_zoom_of_factor_one_changes_nothing() -> None:
    x = torch.rand(2, 3, 20, 20)
    torch.testing.assert_close(zoom_blur(x, (1.0, 0.01), []), x)


def test_glass_moves_pixels_and_loses_none() -> None:
    # A blur this small changes nothing, so that only the exchange of pixels is left.
    x = torch.arange(24.0 * 31).view(1, 1, 24, 31).expand(3, 2, 24, 31) / (24 * 31)
    made = glass_blur(x, (0.01, 2.0, 2.0), [seeded(i) for i in range(3)])
    assert torch.equal(made.flatten(2).sort(2).values, x.flatten(2))
    assert torch.equal(made[:, 0], made[:, 1])
    assert float((made != x)[..., 4:-4, 4:-4].float().mean()) > 0.8
    assert not torch.equal(made[0], made[1])


def test_glass_with_no_room_to_exchange_anything_only_blurs() -> None:
    x = torch.rand(1, 1, 8, 8)
    blurred_twice = gaussian_blur(gaussian_blur(x, (1.5,), []), (1.5,), [])
    torch.testing.assert_close(glass_blur(x, (1.5, 4.0, 2.0), [seeded(0)]), blurred_twice)


def test_partners_in_glass_are_near() -> None:
    x = torch.arange(40.0).expand(1, 1, 40, 40) / 40
    made = glass_blur(x, (0.01, 1.0, 1.0), [seeded(0)])
    # One exchange on a pixel's own account, and up to four by others that choose it.
    assert float((made - x).abs().max()) <= 5 / 40 + 1e-6
