"""Deletion and insertion by hand on a linear model, and the blur that insertion starts from."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from saliency.known_nets import ONES, WEIGHT, linear
from saliency.small_nets import rand
from scipy.ndimage import gaussian_filter
from torch import Tensor

from lightning_robust.saliency.curves import area, blurred, deletion_curve, insertion_curve


def test_the_deletion_curve_of_a_linear_model_loses_one_term_a_step() -> None:
    x = rand(3, 5)
    terms = (x * WEIGHT).double()
    share, found = deletion_curve(linear, x, ONES, terms)
    left = terms.sort(dim=1, descending=True).values.flip(1).cumsum(1).flip(1)  # what is left after 0, 1, ... steps
    expected = torch.cat([left, torch.zeros(3, 1)], 1).sigmoid()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert share.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    torch.testing.assert_close(area(share, found), (expected[:, 1:] + expected[:, :-1]).mean(1) / 2, rtol=0, atol=1e-7)


def test_the_insertion_curve_of_a_linear_model_gains_one_term_a_step() -> None:
    x = rand(3, 5)
    terms = (x * WEIGHT).double()
    _, found = insertion_curve(linear, x, ONES, terms)
    gained = terms.sort(dim=1, descending=True).values.cumsum(1)
    torch.testing.assert_close(found, torch.cat([torch.zeros(3, 1), gained], 1).sigmoid(), rtol=0, atol=1e-7)


def test_inputs_are_replaced_by_the_baseline_in_its_units() -> None:
    x, baseline = rand(3, 5), rand(5)
    _, removed = deletion_curve(linear, x, ONES, x, baseline=baseline)
    torch.testing.assert_close(removed[:, -1], linear(baseline.expand(3, 5)).softmax(1)[:, 1].double())
    torch.testing.assert_close(removed[:, 0], linear(x).softmax(1)[:, 1].double())
    _, inserted = insertion_curve(linear, x, ONES, x, baseline=baseline)
    torch.testing.assert_close(inserted[:, [0, -1]], removed[:, [-1, 0]])


def test_no_order_deletes_faster_than_the_terms_of_a_linear_model_and_none_slower_than_their_reverse() -> None:
    x = rand(3, 5)
    terms = x * WEIGHT
    areas = [area(*deletion_curve(linear, x, ONES, maps)) for maps in (terms, *rand(20, 3, 5), -terms)]
    assert all(bool((areas[0] <= a + 1e-12).all() and (a <= areas[-1] + 1e-12).all()) for a in areas)


def seen_by(curve: Callable[..., object], x: Tensor, maps: Tensor, **settings: object) -> list[Tensor]:
    """All inputs that a curve asks the model about."""
    seen: list[Tensor] = []

    def logits_fn(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.zeros(len(x), 2)

    curve(logits_fn, x, torch.zeros(len(x), dtype=torch.long), maps, **settings)
    return seen


def test_all_channels_of_a_pixel_go_together_and_steps_are_even() -> None:
    x, maps = 1 + rand(2, 3, 8, 9), rand(2, 8, 9)
    seen = seen_by(deletion_curve, x, maps, steps=5)
    assert len(seen) == 6
    for step, inputs in enumerate(seen):
        gone = inputs == 0
        assert torch.equal(gone, gone[:, :1].expand_as(gone))
        assert gone[:, 0].sum((1, 2)).tolist() == [round(72 * step / 5)] * 2
        # What is gone was marked more than what is left.
        assert all(
            not 0 < step < 5 or float(m[g].min()) > float(m[~g].max()) for m, g in zip(maps, gone[:, 0], strict=True)
        )
        assert torch.equal(inputs[~gone], x[~gone])


def test_negative_evidence_goes_last() -> None:
    seen = seen_by(deletion_curve, torch.ones(1, 3), torch.tensor([[-9.0, 1.0, 0.0]]))
    assert [s.tolist()[0] for s in seen] == [[1, 1, 1], [1, 0, 1], [1, 0, 0], [0, 0, 0]]


def test_ties_are_broken_by_the_seed_and_the_row() -> None:
    x, maps = torch.ones(3, 50), torch.zeros(3, 50)
    maps[:, 7] = 1

    def first_half(seed: int, x: Tensor = x, maps: Tensor = maps) -> Tensor:
        return seen_by(deletion_curve, x, maps, steps=2, seed=seed)[1]

    assert torch.equal(first_half(0), first_half(0))
    assert torch.equal(first_half(0)[:2], first_half(0, x[:2], maps[:2]))
    assert not torch.equal(first_half(0), first_half(1))
    assert not torch.equal(first_half(0)[0], first_half(0)[1])
    assert bool((first_half(0)[:, 7] == 0).all())
    assert not torch.equal(first_half(0)[0, :25], torch.zeros(25))  # not simply the first ones


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 1000])
def test_the_size_of_chunks_changes_nothing(chunk_size: int) -> None:
    x, maps = rand(3, 1, 4, 5), rand(3, 4, 5)
    for curve in (deletion_curve, insertion_curve):
        whole = curve(linear, x, ONES, maps)
        torch.testing.assert_close(curve(linear, x, ONES, maps, chunk_size=chunk_size), whole, rtol=0, atol=1e-7)
    assert max(map(len, seen_by(deletion_curve, x, maps, chunk_size=chunk_size))) == min(chunk_size, 3 * 17)


def test_without_chunks_every_forward_sees_all_samples_in_their_order() -> None:
    x = torch.arange(3.0)[:, None] + 1 + torch.zeros(3, 6)
    assert all(bool((s.amax(1) <= x[:, 0]).all()) and len(s) == 3 for s in seen_by(deletion_curve, x, rand(3, 6)))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_yes_or_no_logit_is_two_classes(shape: tuple[int, ...]) -> None:
    x = rand(2, 5)
    for target in (0, 1):
        targets = torch.full((2,), target)
        _, expected = deletion_curve(linear, x, targets, x)
        _, found = deletion_curve(lambda x: (x @ WEIGHT).view(-1, *shape), x, targets, x)
        torch.testing.assert_close(found, expected)


def test_insertion_starts_from_blurred_images_and_from_zeros_elsewhere() -> None:
    images = rand(2, 3, 16, 24)
    assert torch.equal(seen_by(insertion_curve, images, rand(2, 16, 24))[0], blurred(images))
    assert torch.equal(seen_by(insertion_curve, rand(2, 5), rand(2, 5))[0], torch.zeros(2, 5))


@pytest.mark.parametrize("sigma", [0.7, 2.0, 3.0])
def test_the_blur_is_scipys_gaussian_filter(sigma: float) -> None:
    images = rand(2, 3, 24, 31)
    expected = gaussian_filter(images.double().numpy(), sigma, mode="nearest", axes=(2, 3), radius=math.ceil(3 * sigma))
    np.testing.assert_allclose(blurred(images, sigma).numpy(), expected, atol=1e-6)
    default = gaussian_filter(images.double().numpy(), 3.0, mode="nearest", axes=(2, 3), radius=9)
    np.testing.assert_allclose(blurred(images).numpy(), default, atol=1e-6)


def test_the_area_under_uneven_steps_weighs_each_by_its_width() -> None:
    assert area(torch.tensor([0.0, 0.25, 1.0]), torch.tensor([[1.0, 1.0, 0.0]])).tolist() == [0.25 + 0.375]


def test_what_does_not_fit_is_refused() -> None:
    x = rand(2, 3, 4, 4)
    with pytest.raises(
        ValueError, match=r"without channels, \(2, 4, 4\) for inputs \(2, 3, 4, 4\).*got \(2, 3, 4, 4\)"
    ):
        deletion_curve(linear, x, ONES[:2], x)
    with pytest.raises(ValueError, match=r"one target class per sample, \(2,\), got \(3,\)"):
        insertion_curve(linear, x, ONES, x[:, 0])
    with pytest.raises(ValueError, match=r"1 or more, got 0 and 2"):
        deletion_curve(linear, x, ONES[:2], x[:, 0], steps=0)
    with pytest.raises(ValueError, match=r"above 0 pixels, got 0"):
        blurred(x, 0)
    with pytest.raises(ValueError, match=r"broadcast against inputs \(2, 3, 4, 4\), got \(3,\)"):
        deletion_curve(linear, x, ONES[:2], x[:, 0], baseline=torch.zeros(3))
