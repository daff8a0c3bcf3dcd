"""Metrics by condition: torchmetrics' own numbers, in any number of parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchmetrics.classification import BinaryAccuracy, MulticlassAUROC, MulticlassCalibrationError

from lightning_robust.losses import LossCall
from lightning_robust.metrics import UnderAttack
from lightning_robust.randomness import seeded

LOGITS, LABELS = torch.randn(200, 4, generator=seeded(0)) * 2, torch.arange(200) % 4
CALL = LossCall("cross_entropy", LOGITS, LABELS)
ALL = torch.ones(200, dtype=torch.bool)


def test_values_are_those_of_torchmetrics_on_the_samples_that_count() -> None:
    measured = UnderAttack(["clean", "pgd", "never"], {"auroc": MulticlassAUROC(4)}, calibration=True)
    keep = torch.arange(200) < 150
    measured.update("clean", CALL, ALL)
    measured.update("pgd", CALL, keep)
    values = measured.compute(measured.state())
    assert set(values) == {f"{m}_{c}" for m in ("auroc", "ece", "confidence") for c in ("clean", "pgd")}
    for condition, rows in (("clean", ALL), ("pgd", keep)):
        p, y = LOGITS[rows].softmax(1), LABELS[rows]
        assert values[f"auroc_{condition}"] == pytest.approx(float(MulticlassAUROC(4)(p, y)), abs=1e-6)
        assert values[f"confidence_{condition}"] == pytest.approx(float(p.amax(1).mean()), abs=1e-6)
        theirs = float(MulticlassCalibrationError(4, n_bins=15)(p, y))
        assert values[f"ece_{condition}"] == pytest.approx(theirs, abs=1e-6)


def test_calibration_is_summed_over_processes() -> None:
    one, two, whole = (UnderAttack(["clean"], {}, calibration=True) for _ in range(3))
    one.update("clean", CALL, torch.arange(200) < 77)
    two.update("clean", CALL, torch.arange(200) >= 77)
    whole.update("clean", CALL, ALL)
    assert one.compute(one.state() + two.state()) == pytest.approx(whole.compute(whole.state()))


def test_yes_no_outputs_are_probabilities_whatever_their_logits_look_like() -> None:
    z, y = torch.tensor([0.2, 0.3, -0.1, -4.0]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    for shape in ((4,), (4, 1)):
        measured = UnderAttack(["clean"], {"hits": BinaryAccuracy()}, calibration=False)
        for i in range(4):  # in batches of one, all of whose logits may lie in [0, 1]
            call = LossCall("binary_cross_entropy_with_logits", z.view(shape)[i : i + 1], y.view(shape)[i : i + 1])
            measured.update("clean", call, torch.tensor([True]))
        assert measured.compute(measured.state()) == {"hits_clean": 0.75}


def test_a_metric_of_several_numbers_is_refused_by_name() -> None:
    measured = UnderAttack(["clean"], {"each": MulticlassAUROC(4, average=None)}, calibration=False)
    measured.update("clean", CALL, ALL)
    with pytest.raises(ValueError, match=r"one number each, but 'each' computes \(4,\)"):
        measured.compute(measured.state())
    with pytest.raises(ValueError, match=r"one number each, but 'each' computes \(4,\)"):
        measured.check()


def test_a_metric_that_needs_more_samples_than_there_are_is_no_error_yet() -> None:
    class Patient(BinaryAccuracy):
        def compute(self) -> torch.Tensor:
            if int(self.tp + self.tn + self.fp + self.fn) < 3:
                raise ValueError("too few samples")
            return super().compute()

    measured = UnderAttack(["clean"], {"hits": Patient()}, calibration=False)
    call = LossCall("binary_cross_entropy_with_logits", torch.ones(4), torch.ones(4))
    measured.update("clean", call, torch.arange(4) < 2)
    measured.check()
    with pytest.raises(ValueError, match="too few samples"):
        measured.compute(measured.state())
    measured.update("clean", call, torch.arange(4) > 1)
    assert measured.compute(measured.state()) == {"hits_clean": 1.0}


def test_what_measures_nothing_says_so() -> None:
    assert not UnderAttack(["clean"], {}, calibration=False).counts_anything


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric Placed")
def test_metrics_of_a_process_without_a_sample_go_where_processes_talk() -> None:
    class Placed(BinaryAccuracy):
        def compute(self) -> Tensor:
            return torch.tensor(float(self.device.type == "meta"))

    measured = UnderAttack(["clean"], {"placed": Placed()}, calibration=False)
    others = measured.state()
    others[0, 0] = 7.0  # samples of another process
    assert measured.compute(others, torch.device("meta")) == {"placed_clean": 1.0}
