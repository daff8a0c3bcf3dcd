"""Occlusion against a loop over windows, and in closed form."""

from __future__ import annotations

import itertools

import pytest
import torch
from saliency.small_nets import PICTURES, TARGET, cnn, mlp, rand
from torch import Tensor

from lightning_robust.protocols import LogitsFn
from lightning_robust.saliency.occlusion import occlusion


def by_hand(logits_fn: LogitsFn, x: Tensor, target: Tensor, side: int, stride: int, baseline: Tensor) -> Tensor:
    """The mean drop over all windows that cover a place; what sticks out at the end is cut off."""
    rows = range(len(x))
    with torch.no_grad():
        whole = logits_fn(x)[rows, target]
        places = [[*range(0, size - side, stride), size - side] for size in x.shape[2:]]
        total, count = torch.zeros(len(x), *x.shape[2:]), torch.zeros(x.shape[2:])
        for start in itertools.product(*places):
            window = tuple(slice(low, low + side) for low in start)
            hidden = x.clone()
            hidden[(..., *window)] = baseline.expand_as(x)[(..., *window)]
            drop = whole - logits_fn(hidden)[rows, target]
            total[(slice(None), *window)] += drop.view(-1, *[1] * len(window))
            count[window] += 1
    return total / count


@pytest.mark.parametrize(("window", "side"), [(0.25, 2), (0.5, 4), (1.0, 8), (0.01, 1)])
def test_a_pixel_has_the_mean_drop_of_the_windows_over_it(window: float, side: int) -> None:
    net, black = cnn(), torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    expected = by_hand(net, PICTURES, TARGET, side, max(1, side // 2), black)
    maps = occlusion(net, PICTURES, TARGET, window=window, baseline=black)
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5)


def test_of_a_table_one_feature_is_hidden_at_a_time() -> None:
    net, x, baseline = mlp(), rand(4, 6), rand(4, 6) / 3
    expected = torch.zeros(4, 6)
    for feature in range(6):
        hidden = x.clone()
        hidden[:, feature] = baseline[:, feature]
        expected[:, feature] = (net(x) - net(hidden))[range(4), TARGET].detach()
    torch.testing.assert_close(occlusion(net, x, TARGET, baseline=baseline), expected)
    torch.testing.assert_close(occlusion(net, x, TARGET, baseline=baseline, chunk_size=3), expected)


def test_of_a_signal_a_stretch_of_all_channels_is_hidden() -> None:
    weight = torch.arange(20.0).view(1, 2, 10)
    x, target = torch.ones(1, 2, 10), torch.tensor([1])
    maps = occlusion(lambda x: (x * weight).sum((1, 2)), x, target, window=0.1)
    torch.testing.assert_close(maps, weight.sum(1))


def test_what_has_no_gradient_is_explained_too() -> None:
    def steps(x: Tensor) -> Tensor:
        return (x > 0.5).float().detach() @ torch.tensor([[1.0, 2.0], [0.0, 3.0]])

    assert occlusion(steps, torch.tensor([[1.0, 1.0]]), torch.tensor([1])).tolist() == [[2.0, 3.0]]


@pytest.mark.parametrize("window", [0.0, 1.5, -1.0])
def test_a_window_is_a_share_of_the_side(window: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        occlusion(cnn(), PICTURES, TARGET, window=window)
