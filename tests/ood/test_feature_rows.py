"""What detectors take, and what they say to the rest."""

from __future__ import annotations

import pytest
import torch
from ood.processes_together import together
from torch import Tensor

from lightning_robust.ood.feature_rows import WIDEST, TrainingRows, agreed, scores_of


def batch(n: int = 4, width: int = 3, classes: int = 2) -> list[Tensor]:
    return [torch.ones(n, width), torch.zeros(n, classes), torch.zeros(n, dtype=torch.long), torch.arange(n)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, 1])
def test_rows_that_are_no_numbers_are_left_out_and_counted(value: float, column: int) -> None:
    rows, taken = batch(), TrainingRows()
    rows[column][2] = value
    with pytest.warns(UserWarning, match="1 of 4 training rows have NaN or infinite"):
        kept = taken(*rows)
    assert kept[3].tolist() == [0, 1, 3]
    assert {len(row) for row in kept} == {3}
    assert taken.lost == 1


def test_a_class_that_is_ruled_out_loses_no_row() -> None:
    rows, taken = batch(), TrainingRows()
    rows[1][:, 0] = -torch.inf
    assert len(taken(*rows)[0]) == 4
    assert taken.lost == 0


def test_the_warning_comes_once() -> None:
    rows, taken = batch(), TrainingRows()
    rows[0][0] = torch.nan
    with pytest.warns(UserWarning, match="training rows"):
        taken(*rows)
    taken(*rows)
    assert taken.lost == 2


@pytest.mark.parametrize(
    ("column", "shape"), [(0, (4, 3, 2)), (0, (4,)), (1, (4,)), (1, (3, 2)), (2, (3,)), (3, (3,)), (3, (4, 1))]
)
def test_shapes_that_do_not_fit_are_an_error(column: int, shape: tuple[int, ...]) -> None:
    rows = batch()
    rows[column] = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"expected features \(N, D\), logits \(N, K\)"):
        TrainingRows()(*rows)


@pytest.mark.parametrize("sizes", [(5, 2), (3, 7)])
def test_other_sizes_than_before_are_an_error(sizes: tuple[int, int]) -> None:
    taken = TrainingRows()
    taken(*batch())
    with pytest.raises(ValueError, match=r"\(features, classes\) = \(3, 2\) as in earlier batches, got \("):
        taken(*batch(4, *sizes))


def test_more_features_than_anyone_can_square_are_an_error() -> None:
    with pytest.raises(ValueError, match=f"1 to {WIDEST} features, got {WIDEST + 1}"):
        TrainingRows()(*batch(1, WIDEST + 1))


def test_processes_agree_about_sizes_that_one_of_them_does_not_know() -> None:
    found: list[tuple[int, ...]] = []
    together([lambda s, own=own: found.append(agreed(own, s)) for own in ((512, 10), None, (512, 10))])  # type: ignore[misc]  # a default argument
    assert found == [(512, 10)] * 3


def test_nobody_knows_sizes_where_nobody_has_samples() -> None:
    found: list[tuple[int, ...]] = []
    together([lambda s: found.append(agreed(None, s))] * 2)
    assert found == [(), ()]


def test_processes_with_different_sizes_raise_all_together() -> None:
    # The one in the middle has just the mean of the others.
    with pytest.raises(ValueError, match="expected the same sizes in all processes"):
        together([lambda s, own=own: agreed([own], s) for own in (1, 2, 3)])  # type: ignore[misc]  # a default argument


def test_scores_of_what_is_no_number_are_nan_and_the_others_stay() -> None:
    x = torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [torch.inf, -torch.inf]])
    found = scores_of(x, 2, lambda rows: rows.sum(1))
    assert found.isnan().tolist() == [False, True, True]
    assert found[0] == 3


@pytest.mark.parametrize("shape", [(4, 3), (4,), (4, 2, 1)])
def test_features_of_another_width_are_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected features \(N, 2\) as learned from, got \("):
        scores_of(torch.zeros(shape), 2, lambda x: x.sum(1))
