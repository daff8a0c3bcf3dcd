"""What was fitted, on its way through a checkpoint into a test."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lightning_robust.attach.everyone import Everyone
from lightning_robust.calibration import Reliability, fit_temperature
from lightning_robust.callbacks.fitted import Fitted, StoredFits, report
from lightning_robust.callbacks.recalibration import TEMPERATURE, Recalibration, Rows
from lightning_robust.callbacks.reported import Reported
from lightning_robust.randomness import seeded

ALONE = Everyone(SimpleNamespace(world_size=1, global_rank=0), lambda state: state)
LOG_P = (4 * torch.randn(300, 3, generator=seeded(0))).log_softmax(1)
LABELS = torch.where(torch.arange(300) % 3 == 0, torch.arange(300) % 2, LOG_P.argmax(1))
ROWS = Rows(LOG_P, LABELS, torch.arange(300))


def fitted(others: Rows | None = None) -> Fitted:
    recalibration = Recalibration(["vector"], 0.1, 0, ALONE)
    fit = recalibration.fit(ROWS)
    return Fitted(fit, recalibration, report(recalibration, ROWS, others, Reported(15, False, None)))


def test_the_entry_is_of_the_fit_and_of_what_it_was_reported_on() -> None:
    half = ROWS.where(torch.arange(300) < 150)
    found = fitted(half)
    entry = found.entry(7)
    temperature = fit_temperature(LOG_P, LABELS).temperature
    assert entry["temperature"] == pytest.approx(temperature)
    assert (entry["fit_step"], entry["samples"]) == (7, 300)
    assert entry["nll"] == pytest.approx(Reliability.of(half.log_p, half.labels).mean_nll)
    scaled = Reliability.of((half.log_p / temperature).log_softmax(1), half.labels)
    assert entry["nll_scaled"] == pytest.approx(scaled.mean_nll, rel=1e-5)


def test_where_nothing_is_left_to_report_on_the_entry_has_the_losses_of_the_fit() -> None:
    found = fitted(ROWS.where(torch.zeros(300, dtype=torch.bool)))
    assert found.reported.n == 0
    assert found.entry(7)["nll"] == pytest.approx(Reliability.of(LOG_P, LABELS).mean_nll, rel=1e-5)


def test_without_an_error_the_entry_changes_nothing_and_says_so() -> None:
    recalibration, right = Recalibration([], 0.1, 0, ALONE), Rows(LOG_P, LOG_P.argmax(1), torch.arange(300))
    fit = recalibration.fit(right)
    found = Fitted(fit, recalibration, report(recalibration, right, None, Reported(15, False, None)))
    entry = found.entry(7)
    assert (entry["temperature"], entry["at_bound"], found.values()["temperature"]) == (1.0, True, 1.0)
    assert entry["nll_scaled"] == pytest.approx(entry["nll"])


def test_a_test_does_with_the_entry_what_the_fits_do() -> None:
    found = fitted()
    stored = StoredFits.load(found.entry(7), ["vector"], 0.1)
    assert list(stored.recalibrators) == [TEMPERATURE, "vector"]
    assert list(stored.sets) == list(found.recalibration.sets)
    for name, after in found.recalibration.recalibrated(ROWS).items():
        assert torch.allclose(stored.recalibrators[name](LOG_P), after)


def test_what_was_not_fitted_is_said() -> None:
    entry = fitted().entry(7)
    with pytest.warns(UserWarning, match=r"without methods=\['platt'\] and prediction_sets=0.2, of which nothing"):
        stored = StoredFits.load(entry, ["platt"], 0.2)
    assert (list(stored.recalibrators), list(stored.sets)) == ([TEMPERATURE], [])


def test_without_a_temperature_nothing_is_stored_and_nothing_is_said() -> None:
    assert not StoredFits.load({}, ["vector"], 0.1).recalibrators
