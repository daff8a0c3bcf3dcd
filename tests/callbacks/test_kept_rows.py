"""Predictions that are kept for a fit: which are fitted on, and which are reported on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lightning_robust.attach.everyone import Everyone
from lightning_robust.callbacks.kept_rows import KeptRows
from lightning_robust.callbacks.recalibration import Rows
from lightning_robust.randomness import seeded

ALONE = Everyone(SimpleNamespace(world_size=1, global_rank=0), lambda state: state)
LOG_P = torch.randn(40, 3, generator=seeded(0)).log_softmax(1)
LABELS = torch.arange(40) % 3


def filled(kept: KeptRows, log_p: Tensor = LOG_P) -> KeptRows:
    kept.add(log_p, LABELS, torch.arange(40))
    return kept


def samples(rows: Rows | None) -> list[int]:
    return [] if rows is None else sorted(rows.sample.tolist())


def test_all_are_fitted_on_where_nothing_is_split_off() -> None:
    fitted_on, others = filled(KeptRows(100, seed=0)).parted(ALONE)
    assert samples(fitted_on) == list(range(40))
    assert others is None


def test_a_split_reports_on_what_it_does_not_fit_on() -> None:
    fitted_on, others = filled(KeptRows(100, seed=0, split=0.5)).parted(ALONE)
    assert 10 < len(fitted_on) < 30
    assert sorted(samples(fitted_on) + samples(others)) == list(range(40))


def test_other_data_are_fitted_on_also_where_there_are_none_here() -> None:
    fitted_on, others = filled(KeptRows(100, seed=0, apart=True)).parted(ALONE)
    assert samples(fitted_on) == []
    assert samples(others) == list(range(40))


def test_rows_keep_the_groups_of_their_samples_whatever_order_these_came_in() -> None:
    kept = filled(KeptRows(100, seed=0))
    kept.add_groups(torch.arange(20, 40), torch.arange(20, 40) % 7)
    kept.add_groups(torch.arange(20), torch.arange(20) % 7)
    rows = kept.parted(ALONE)[0]
    assert rows.codes is not None
    assert torch.equal(rows.codes, rows.sample % 7)


def test_rows_without_a_finite_loss_are_counted_and_left_out() -> None:
    broken = LOG_P.clone()
    broken[[3, 8]] = torch.nan
    with pytest.warns(UserWarning, match="2 predictions .* are NaN or infinite"):
        fitted_on, _ = filled(KeptRows(100, seed=0), broken).parted(ALONE)
    assert samples(fitted_on) == [i for i in range(40) if i not in (3, 8)]
