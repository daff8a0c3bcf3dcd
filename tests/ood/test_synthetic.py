"""Foreign pictures made of familiar ones: of the same pixels, in range, and each by its own generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import scipy.stats
import torch
from torch import Generator, Tensor

from lightning_robust.ood import SYNTHETIC, mosaic, noise, shuffle
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import seeded, untouched_random_state

Maker = Callable[[Tensor, Sequence[Generator], PixelSpace], Tensor]

PLAIN = PixelSpace()
NORMALISED = PixelSpace(mean=(0.1, 0.5, 0.3), std=(0.2, 0.5, 1.0))

each_maker = pytest.mark.parametrize("maker", SYNTHETIC.values(), ids=SYNTHETIC)
each_mover = pytest.mark.parametrize("mover", [shuffle, mosaic])


def pictures(n: int = 5, channels: int = 3, height: int = 28, width: int = 28) -> Tensor:
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(0))


def generators(*numbers: int) -> list[Generator]:
    return [seeded(7, number) for number in numbers]


def places(height: int, width: int) -> Tensor:
    """A picture whose pixels say where they stood."""
    return torch.arange(float(height * width)).view(1, 1, height, width)


@each_maker
@pytest.mark.parametrize("pixels", [PLAIN, NORMALISED, PixelSpace(bounds=(0, 255)), PixelSpace(bounds=None)])
@pytest.mark.parametrize("size", [(28, 28), (5, 9)])
def test_what_comes_out_is_a_legal_picture_of_the_same_shape(
    maker: Maker, pixels: PixelSpace, size: tuple[int, int]
) -> None:
    x = pixels.to_model(pictures(5, 3, *size) * (pixels.bounds or (0, 1))[1])
    made = maker(x, generators(*range(5)), pixels)
    assert made.shape == x.shape
    pixels.check(made)
    assert not torch.equal(made, x)


@each_maker
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_type_stays(maker: Maker, dtype: torch.dtype) -> None:
    assert maker(pictures().to(dtype), generators(*range(5)), PLAIN).dtype == dtype


@each_maker
def test_a_picture_depends_on_its_own_generator_alone(maker: Maker) -> None:
    x = pictures()
    together = maker(x, generators(*range(5)), NORMALISED)
    alone = [maker(x[i : i + 1], generators(i), NORMALISED) for i in (4, 2, 0)]
    assert torch.equal(torch.cat(alone), together[[4, 2, 0]])
    assert not torch.equal(maker(x[:1], generators(9), NORMALISED), together[:1])


@each_maker
def test_global_streams_and_inputs_stay_as_they_are(maker: Maker) -> None:
    x = pictures()
    with untouched_random_state() as state:
        maker(x, generators(*range(5)), PLAIN)
        assert state.is_current()
    assert torch.equal(x, pictures())


@each_maker
def test_no_pictures_make_no_pictures(maker: Maker) -> None:
    assert maker(pictures(0), [], PLAIN).shape == (0, 3, 28, 28)


@each_maker
@pytest.mark.parametrize(
    "x", [torch.zeros(2, 8), torch.zeros(2, 3, 8), torch.zeros(2, 1, 3, 8), torch.zeros(2, 3, 8, 2)]
)
def test_what_is_no_picture_is_an_error(maker: Maker, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected float pictures \(N, C, H, W\) with sides of at least 4"):
        maker(x, generators(0, 1), PLAIN)


@each_maker
def test_whole_numbers_are_an_error(maker: Maker) -> None:
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        maker(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), generators(0, 1), PLAIN)


@each_maker
def test_one_generator_too_few_is_an_error(maker: Maker) -> None:
    with pytest.raises(ValueError, match="one generator per picture, got 4 for 5"):
        maker(pictures(), generators(*range(4)), PLAIN)


@pytest.mark.parametrize("pixels", [PLAIN, PixelSpace(bounds=(-1, 3)), PixelSpace(mean=0.5, std=0.25)])
def test_noise_is_uniform_over_the_bounds(pixels: PixelSpace) -> None:
    low, high = pixels.bounds or (0, 0)
    made = pixels.to_pixels(noise(torch.zeros(20, 1, 28, 28), generators(*range(20)), pixels))
    assert scipy.stats.kstest(made.flatten().double().numpy(), "uniform", (low, high - low)).pvalue > 0.01


def test_noise_without_bounds_spans_each_picture_it_replaces() -> None:
    x = pictures(3) * torch.tensor([1.0, 10.0, 0.0]).view(3, 1, 1, 1) - 4
    made = noise(x, generators(0, 1, 2), PixelSpace(bounds=None))
    for before, after in zip(x, made, strict=True):
        assert before.min() <= after.min()
        assert after.max() <= before.max()
        assert after.max() - after.min() >= 0.99 * (before.max() - before.min())


@each_mover
def test_all_pixels_are_there_again_and_channels_move_together(mover: Maker) -> None:
    made = mover(places(28, 28).expand(4, 3, 28, 28), generators(*range(4)), PLAIN)
    assert torch.equal(made[:, 0], made[:, 1])
    assert torch.equal(made[:, 0], made[:, 2])
    assert torch.equal(made[:, 0].flatten(1).sort(1).values, places(28, 28).flatten().expand(4, -1))


@each_mover
def test_nothing_ever_stays_in_its_place(mover: Maker) -> None:
    made = mover(places(4, 4).expand(500, 1, 4, 4), generators(*range(500)), PLAIN)
    assert not bool((made == places(4, 4)).any())


@each_mover
def test_every_other_place_is_as_likely(mover: Maker) -> None:
    made = mover(places(4, 4).expand(3000, 1, 4, 4), generators(*range(3000)), PLAIN).flatten(1)
    for place in range(16):
        seen = made[:, place].long().bincount(minlength=16)
        assert seen[place] == 0
        assert scipy.stats.chisquare(seen[torch.arange(16) != place].numpy()).pvalue > 1e-4


@each_mover
def test_normalised_pictures_move_as_plain_ones_do(mover: Maker) -> None:
    x = pictures()
    moved = NORMALISED.to_model(mover(x, generators(*range(5)), PLAIN))
    assert torch.equal(mover(NORMALISED.to_model(x), generators(*range(5)), NORMALISED), moved)


def test_a_shuffled_picture_has_no_neighbours_left() -> None:
    x = torch.linspace(0, 1, 28).expand(1, 1, 28, 28)
    made = shuffle(x, generators(0), PLAIN)
    correlation = torch.corrcoef(torch.stack([made[..., 1:].flatten(), made[..., :-1].flatten()]))[0, 1]
    assert abs(correlation) < 4 / 27  # of 756 pairs: four standard deviations


def test_patches_of_a_mosaic_are_whole() -> None:
    made = mosaic(places(28, 12), generators(0), PLAIN)[0, 0]
    for patch in made.unfold(0, 7, 7).unfold(1, 3, 3).reshape(16, 7, 3):
        corner = int(patch[0, 0])
        assert (corner // 12 % 7, corner % 12 % 3) == (0, 0)
        assert torch.equal(patch, patch[0, 0] + places(7, 12)[0, 0, :, :3])


@pytest.mark.parametrize("height", range(4, 12))
@pytest.mark.parametrize("width", [4, 7, 10])
def test_a_mosaic_of_any_size_holds_pixels_of_the_picture_and_moves_each(height: int, width: int) -> None:
    made = mosaic(places(height, width).expand(20, 1, -1, -1), generators(*range(20)), PLAIN)
    assert bool(torch.isin(made, places(height, width)).all())
    assert not bool((made == places(height, width)).any())
    # Of what is left out or doubled there is little: at most the last row and column of each patch.
    kept = torch.tensor([len(picture.unique()) for picture in made])
    assert bool((kept >= (height // 4 * 4) * (width // 4 * 4) / 4).all())
