"""The plumbing of all methods: heads, contexts, chunks and the sentences for what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust import saliency
from lightning_robust.saliency.explaining import broadcast, class_logits, explained, of_targets, without_channels

X, TARGET = torch.arange(10.0).view(5, 2), torch.tensor([0, 1, 1, 0, 1])


@pytest.mark.parametrize(("size", "chunks"), [(None, [5]), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_samples_and_what_goes_beside_them_come_in_chunks(size: int | None, chunks: list[int]) -> None:
    seen: list[int] = []

    def attribute(logits: object, x: Tensor, target: Tensor, beside: Tensor) -> Tensor:
        assert x.requires_grad
        assert len(x) == len(target) == len(beside)
        seen.append(len(x))
        return x * target[:, None] + beside

    maps = explained(attribute, lambda x: x, X, TARGET, size, 10 * X)
    assert seen == chunks
    assert torch.equal(maps, X * TARGET[:, None] + 10 * X)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_logit_a_sample_is_a_yes_or_no(shape: tuple[int, ...]) -> None:
    logits = class_logits(lambda x: x[:, 0].view(-1, *shape))
    assert logits(X).tolist() == [[-value, value] for value in X[:, 0].tolist()]
    assert of_targets(logits, X, TARGET).tolist() == [0.0, 2.0, 4.0, -6.0, 8.0]


def test_logits_of_several_classes_stay_as_they_are() -> None:
    assert torch.equal(class_logits(lambda x: x)(X), X)


def test_logits_that_are_not_of_one_class_a_sample_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected logits \(5, K\) of 5 inputs, got \(5, 2, 3\)"):
        class_logits(lambda x: x[..., None].expand(-1, -1, 3))(X)
    with pytest.raises(ValueError, match=r"expected logits \(5, K\) of 5 inputs, got \(4, 2\)"):
        class_logits(lambda x: x[1:])(X)


@pytest.mark.parametrize("target", [torch.tensor([0, 1, 2, 0, 0]), torch.tensor([0, 1, -1, 0, 0])])
def test_targets_that_are_no_classes_are_refused(target: Tensor) -> None:
    with pytest.raises(ValueError, match=r"target classes go from -?\d to \d, but the logits have 2 classes"):
        explained(lambda logits, x, target: logits(x), lambda x: x, X, target, None)


def test_logits_without_a_gradient_are_named_as_the_cause() -> None:
    with pytest.raises(ValueError, match="the logits have no gradient with respect to the inputs"):
        explained(lambda logits, x, target: logits(x), lambda x: x.detach(), X, TARGET, None)


def test_a_baseline_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"broadcast against inputs \(5, 2\), got \(3,\)"):
        broadcast(torch.zeros(3), X)


def test_labels_of_a_yes_no_loss_may_be_floats() -> None:
    maps = explained(lambda logits, x, target: x * target[:, None], lambda x: x, X, TARGET.float(), None)
    assert torch.equal(maps, X * TARGET[:, None])


def test_channels_are_summed_where_there_are_any() -> None:
    assert torch.equal(without_channels(torch.ones(2, 3, 4)), torch.full((2, 4), 3.0))
    assert torch.equal(without_channels(X), X)


IN_PLACE = [
    *(saliency.gradient, saliency.input_x_gradient, saliency.smoothgrad, saliency.integrated_gradients),
    saliency.occlusion,
]


@pytest.mark.parametrize("method", IN_PLACE, ids=lambda m: m.__name__)
def test_a_network_whose_first_operation_is_in_place_leaves_the_inputs_alone(method: Any) -> None:
    head, x, target = nn.Linear(6, 3), torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    kept = x.clone()
    maps = method(nn.Sequential(nn.ReLU(inplace=True), head), x, target)
    assert torch.equal(x, kept)
    torch.testing.assert_close(maps, method(nn.Sequential(nn.ReLU(), head), x, target))


def test_completeness_leaves_inputs_and_baselines_alone_too() -> None:
    net, x, baseline = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3)), torch.randn(4, 6), torch.randn(1, 6)
    kept = x.clone(), baseline.clone()
    maps = saliency.integrated_gradients(net, x, torch.zeros(4).long(), baseline=baseline)
    saliency.completeness(net, x, torch.zeros(4).long(), maps, baseline)
    assert torch.equal(x, kept[0])
    assert torch.equal(baseline, kept[1])
