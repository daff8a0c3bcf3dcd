"""What hiding a tile costs is captum's occlusion of the log-probability."""

from __future__ import annotations

import pytest
import torch
from captum.attr import Occlusion
from torch import Tensor, nn

from lightning_robust.saliency.hidden_tiles import hidden_tiles

SIDE = 14


def net(outputs: int = 10) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * SIDE**2, outputs)).eval()


def test_hidden_tiles_are_captums_occlusion_of_the_log_probability() -> None:
    module, x, target = net(), torch.rand(3, 2, SIDE, SIDE), torch.tensor([1, 0, 9])
    maps = hidden_tiles(module, x, target, baseline=0.4)
    expected = Occlusion(lambda x: module(x).log_softmax(1)).attribute(x, (2, 2, 2), (2, 2, 2), 0.4, target)
    torch.testing.assert_close(maps, expected[:, 0])


def test_a_yes_no_head_is_the_two_classes_that_it_stands_for() -> None:
    module, x = net(1), torch.rand(2, 2, SIDE, SIDE)

    def both(x: Tensor) -> Tensor:
        return torch.cat([torch.zeros(len(x), 1), module(x)], dim=1)

    for kind in (1, 0):
        target = torch.full((2,), kind)
        torch.testing.assert_close(hidden_tiles(module, x, target), hidden_tiles(both, x, target), atol=1e-6, rtol=1e-4)


def test_chunks_odd_sizes_and_inference_mode_change_nothing() -> None:
    module, x, target = net(), torch.rand(3, 2, SIDE, SIDE), torch.tensor([1, 0, 9])
    whole = hidden_tiles(module, x, target, tiles=5)
    with torch.inference_mode():
        torch.testing.assert_close(hidden_tiles(module, x, target, tiles=5, chunk_size=2), whole)
    assert not bool((whole == 0).any())  # every pixel belongs to a tile


@pytest.mark.parametrize(("shape", "tiles"), [((2, 3), 7), ((2, 1, 6, 20), 7), ((2, 1, 8, 8), 0)])
def test_what_has_no_tiles_is_refused(shape: tuple[int, ...], tiles: int) -> None:
    with pytest.raises(ValueError, match=r"needs pictures \(N, C, H, W\)"):
        hidden_tiles(net(), torch.rand(shape), torch.zeros(2).long(), tiles=tiles)
