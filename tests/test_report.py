"""The table: what is shown, in which words, and what is not."""

from __future__ import annotations

from lightning_robust.report import cells, table

ECE = {"ece": 0.0314, "ece_low": 0.0121, "ece_high": 0.0502, "ece_floor": 0.0177}
METRICS = {
    "test/accuracy": 0.976,
    "test/loss": 0.08,
    "robust/test/clean_accuracy": 0.976,
    "robust/test/accuracy": 0.8,
    "robust/test/accuracy_pgd20x2_linf_0.2": 0.896,
    "robust/test/accuracy_mine": 0.8,
    **{f"calibration/test/{name}": value for name, value in ECE.items()},
    **{f"calibration/test/{name.replace('ece', 'ece_scaled')}": value / 2 for name, value in ECE.items()},
    "calibration/test/nll": 0.12,
    "calibration/test/nll_scaled": 0.086,
    "calibration/test/brier": 0.05,
    "calibration/test/temperature": 1.4871,
    "ood/test/letters/energy_auroc": 0.8583,
    "ood/test/letters/energy_fpr95": 0.5,
    "ood/test/letters/msp_auroc": 0.85,
    "ood/test/synthetic_noise/energy_auroc": 0.999,
    "saliency/val/flips": 0.1,
    "saliency/val_integrated_gradients/iou10_to_anchor": 0.5412,
    "saliency/val_integrated_gradients/cosine_to_anchor": 0.9,
}


def test_every_capability_has_its_rows_in_a_fixed_order() -> None:
    expected = {
        "clean accuracy": "97.6 %",
        "accuracy, worst of 2 attacks": "80.0 %",
        "accuracy under PGD-20 with 2 restarts, linf 0.2": "89.6 %",
        "accuracy under mine": "80.0 %",
        "NLL": "0.120",
        "NLL after temperature": "0.086",
        "ECE [95 % interval], floor": "0.031 [0.012, 0.050], 0.018",
        "ECE after temperature [95 % interval], floor": "0.016 [0.006, 0.025], 0.009",
        "temperature (fitted on validation data)": "1.487",
        "AUROC, letters against test data (energy)": "0.858",
        "AUROC, synthetic noise against test data (energy)": "0.999",
        "integrated gradients maps of first and last epoch: overlap, cosine": "0.54, 0.90",
    }
    assert list(cells(METRICS).items()) == list(expected.items())
    backwards = dict(reversed(METRICS.items()))
    assert set(cells(backwards)) - set(expected) == {
        f"AUROC, {name} against test data ({score})" for name, score in (("letters", "msp"),)
    }  # the score that was logged first stands for its set


def test_shift_has_its_mean_what_is_kept_of_it_and_each_loader() -> None:
    shift = {"clean_accuracy": 0.9, "sampled_accuracy": 0.6, "mean_accuracy": 0.675, "retention": 0.75}
    shift |= {"mean_nll": 1.0, "uci_digits/accuracy": 0.5, "uci_digits/retention": 0.6}
    assert list(cells({f"shift/test/{name}": value for name, value in shift.items()}).items()) == [
        ("accuracy under corruption, mean", "67.5 %"),
        ("accuracy kept under corruption", "75.0 %"),
        ("accuracy on uci digits", "50.0 %"),
    ]
    assert list(cells({"shift.b/test/retention": 0.5})) == ["accuracy kept under corruption (b)"]


def test_other_recalibrators_and_prediction_sets_have_rows() -> None:
    found = {"nll": 0.2, "nll_scaled": 0.15, "nll_vector": 0.125, "ece_vector": 0.1, "accuracy_vector": 0.9}
    found |= {"coverage_lac": 0.912, "set_size_lac": 1.234, "worst_class_coverage_lac": 0.8, "empty_lac": 0.0}
    assert list(cells({f"calibration/test/{name}": value for name, value in found.items()}).items()) == [
        ("NLL", "0.200"),
        ("NLL after temperature", "0.150"),
        ("NLL after vector", "0.125"),
        ("prediction sets (lac): coverage, mean size", "91.2 %, 1.23"),
    ]


def test_each_detector_has_a_row_and_a_mean_only_if_it_is_one_of_several_sets() -> None:
    found = {
        "letters/energy_auroc": 0.9,
        "letters/energy_worst_group_auroc": 0.8,
        "letters/msp_auroc": 0.85,
        "letters/knn_auroc": 0.95,
        "patches/energy_auroc": 0.7,
        "patches/knn_auroc": 0.75,
        "attacked/energy_auroc": 0.6,
        "near/energy_auroc": 0.9,  # of letters alone
        "near/knn_auroc": 0.95,
        "far/energy_auroc": 0.8,
        "far/knn_auroc": 0.85,
    }
    assert list(cells({f"ood/test/{name}": value for name, value in found.items()}).items()) == [
        ("AUROC, letters against test data (energy)", "0.900"),
        ("AUROC, letters (knn)", "0.950"),
        ("AUROC, patches against test data (energy)", "0.700"),
        ("AUROC, patches (knn)", "0.750"),
        ("AUROC, test data under attack (energy)", "0.600"),
        ("AUROC, far, mean of sets (energy)", "0.800"),
        ("AUROC, far, mean of sets (knn)", "0.850"),
    ]


def test_the_accuracy_of_the_calibration_stands_in_where_no_other_is_known() -> None:
    assert cells({"calibration/test/accuracy": 0.5}) == {"accuracy": "50.0 %"}
    assert cells({"calibration/test/accuracy": 0.5, "test/accuracy": 0.25}) == {"accuracy": "25.0 %"}
    assert "accuracy" not in cells({"calibration/test/accuracy": 0.5, "robust/test/clean_accuracy": 0.25})


def test_the_users_own_accuracy_stands_in_where_nothing_attacks() -> None:
    assert cells({"test/accuracy": 0.5, "test/loss": 1.0}) == {"accuracy": "50.0 %"}
    assert cells({"val/accuracy": 0.5, "robust/val/accuracy": 0.5}) == {}


def test_named_callbacks_are_told_apart() -> None:
    named = {
        "robust.strong/test/clean_accuracy": 0.5,
        "calibration.second/test/nll": 1.0,
        "ood.b/test/x/msp_auroc": 1.0,
    }
    assert list(cells(named)) == ["clean accuracy (strong)", "NLL (second)", "AUROC, x against test data (msp) (b)"]


def test_loaders_after_the_first_are_left_out_of_rows_and_counts() -> None:
    first = {"robust/test/clean_accuracy": 0.9, "robust/test/accuracy": 0.5, "robust/test/accuracy_pgd": 0.5}
    second = {f"{key}/1": 0.1 for key in first} | {"calibration/test/nll": 1.0, "calibration/test/nll/far": 9.0}
    assert cells({**second, **first}) == {"clean accuracy": "90.0 %", "accuracy under pgd": "50.0 %", "NLL": "1.000"}


def test_a_column_without_a_measurement_has_a_dash() -> None:
    lines = table([("same", {"calibration/test/nll": 0.5, "test/accuracy": 1.0}), ("same", {"test/accuracy": 0.25})])
    assert lines.splitlines() == [
        "| on held-out test data | same | same |",
        "| --- | ---: | ---: |",
        "| accuracy | 100.0 % | 25.0 % |",
        "| NLL | 0.500 | - |",
    ]
