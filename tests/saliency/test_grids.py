"""Which layouts are read, and that what may be read in two ways is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_robust.saliency.grids import as_feature_map, enlarged_to, token_grid

X = torch.zeros(2, 3, 32, 32)


@pytest.mark.parametrize(
    ("tokens", "size", "grid"),
    [
        (196, (224, 224), (0, 14, 14)),
        (197, (224, 224), (1, 14, 14)),
        (198, (224, 224), (2, 14, 14)),  # DeiT's class and distillation tokens
        (201, (224, 224), (5, 14, 14)),  # a class token and four registers
        (257, (224, 224), (1, 16, 16)),
        (128, (32, 64), (0, 8, 16)),
        (129, (64, 32), (1, 16, 8)),
        (84, (30, 50), (0, 7, 12)),  # patches of 4; what is left over is cut off
        (85, (30, 50), (1, 7, 12)),
    ],
)
def test_tokens_of_known_transformers_have_a_grid(
    tokens: int, size: tuple[int, int], grid: tuple[int, int, int]
) -> None:
    assert token_grid(tokens, size) == grid


@pytest.mark.parametrize(
    ("tokens", "size"), [(1, (32, 32)), (2, (32, 32)), (12, (32, 32)), (77, (224, 224)), (0, (8, 8))]
)
def test_other_numbers_of_tokens_have_none(tokens: int, size: tuple[int, int]) -> None:
    assert token_grid(tokens, size) is None


def numbered(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def test_a_patch_is_where_it_was_cut() -> None:
    tokens = numbered(2, 21, 8)  # 4 x 4 and five in front
    found, extra = as_feature_map(tokens, X, nn.LayerNorm(8))
    assert (found.shape, extra) == ((2, 8, 4, 4), 5)
    assert torch.equal(found[1, :, 2, 3], tokens[1, 5 + 2 * 4 + 3])


def test_feature_maps_stay_and_channels_move_to_the_front() -> None:
    first = numbered(2, 8, 4, 4)
    assert as_feature_map(first, X, nn.Conv2d(3, 8, 1))[0] is first
    last = first.movedim(1, -1)
    block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    for layer in (nn.LayerNorm(8), nn.Linear(3, 8), block):
        assert torch.equal(as_feature_map(last, X, layer)[0], first)


def test_a_convolution_keeps_its_channels_first_whatever_the_numbers_say() -> None:
    for shape in ((2, 4, 4, 7), (2, 4, 4, 4), (2, 64, 64, 8)):
        assert as_feature_map(torch.zeros(shape), X, nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))[0].shape == shape


def test_what_may_be_read_in_two_ways_is_refused() -> None:
    block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="may have its channels first or last"):
        as_feature_map(torch.zeros(2, 8, 8, 8), X, block)
    with pytest.raises(ValueError, match="may have its channels first or last"):  # a whole Swin, with its patches
        as_feature_map(torch.zeros(2, 4, 4, 48), X, nn.Sequential(nn.Conv2d(3, 8, 4), nn.LayerNorm(8)))
    with pytest.raises(ValueError, match="may be 16 tokens or 64 tokens"):
        as_feature_map(torch.zeros(2, 16, 64), X, nn.Identity())


def test_activations_have_their_channels_first_unless_they_are_tokens() -> None:
    assert as_feature_map(torch.zeros(2, 8, 4, 4), X, nn.ReLU())[0].shape == (2, 8, 4, 4)
    assert as_feature_map(torch.zeros(2, 16, 7), X, nn.Identity())[0].shape == (2, 7, 4, 4)


@pytest.mark.parametrize(
    ("shape", "layer"),
    [
        ((2, 8), nn.Linear(3, 8)),
        ((2, 15, 8), nn.LayerNorm(8)),  # no grid
        ((8, 17, 8), nn.LayerNorm(8)),  # windows: more rows than samples
        ((2, 16, 8), nn.BatchNorm1d(16)),  # features first
        ((2, 2, 4, 17, 8), nn.LayerNorm(8)),
    ],
)
def test_what_is_no_map_is_refused(shape: tuple[int, ...], layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"output is \(M, K, ...\) like the input \(2, 3, 32, 32\), or the tokens"):
        as_feature_map(torch.zeros(shape), X, layer)


def test_tokens_of_a_signal_are_refused_and_its_feature_maps_are_not() -> None:
    x = torch.zeros(2, 3, 32)
    assert as_feature_map(torch.zeros(2, 8, 16), x, nn.Conv1d(3, 8, 2))[0].shape == (2, 8, 16)
    with pytest.raises(ValueError, match="class activation maps need"):
        as_feature_map(torch.zeros(2, 17, 8), x, nn.LayerNorm(8))


@pytest.mark.parametrize("size", [(1, 3, 8), (1, 3, 8, 6), (1, 3, 4, 4, 4)])
def test_maps_are_enlarged_in_any_number_of_dimensions(size: tuple[int, ...]) -> None:
    flat = enlarged_to(torch.full((1, *[2] * (len(size) - 2)), 3.0), torch.Size(size))
    assert torch.equal(flat, torch.full((1, *size[2:]), 3.0))
