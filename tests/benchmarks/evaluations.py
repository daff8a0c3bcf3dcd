"""What monitors cost an evaluation: over the same evaluation without them, and over forwards of the same samples."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.data import TensorDataset

from lightning_robust import CalibrationMonitor, CorruptionMonitor, OODMonitor, SaliencySnapshots, TemperatureScaling
from lightning_robust.attach.monitor import Monitor
from lightning_robust.attach.probe import Probe
from lightning_robust.corruptions import CORRUPTIONS, SEVERITIES
from tests.benchmarks.subjects import Plain, Subject, trainer
from tests.benchmarks.timing import Row, compared, interleaved, progress

__all__ = ["corruptions", "in_distribution", "monitors"]

FEW = 8  # foreign samples: what is left is the cost of one's own data
FITTED_ON = 600  # training samples; more than the widest features that are timed here have


def monitors() -> list[Row]:
    """A validation epoch (2,000 digits; 64,000 rows of a table) with monitors over the same epoch without any."""
    rows: list[Row] = []
    for subject in (Subject("cnn", 250, batches=8, size=28, channels=1), Subject("mlp", 64, batches=1000)):
        progress(f"monitors: {subject.name}")
        rows += compared("monitors", subject.name, interleaved(_validations(subject, _monitors(subject)), 9), "none")
    return rows


def _validations(subject: Subject, monitors: dict[str, list[Any]]) -> dict[str, Any]:
    module = Plain(subject.net())
    # The Trainers have seen a validation before: what happens once a run is not in it.
    return {
        what: partial(trainer(*callbacks).validate, module, subject.loader, verbose=False)
        for what, callbacks in monitors.items()
    }


def _monitors(subject: Subject) -> dict[str, list[Any]]:
    def foreign() -> OODMonitor:
        # Synthetic sets are made of pictures; a table is given one.
        return OODMonitor() if subject.x.ndim == 4 else OODMonitor({"shifted": TensorDataset(subject.x[:1000] + 1)})

    methods = ["gradient", "integrated_gradients", "gradcam"][: 3 if subject.x.ndim == 4 else 2]
    return {
        "none": [],
        "listening alone": [Monitor("listening", None, Probe(), ["val"])],
        "calibration": [CalibrationMonitor()],
        "calibration, temperature": [CalibrationMonitor(), TemperatureScaling()],
        f"{'3 synthetic OOD sets' if subject.x.ndim == 4 else 'an OOD set'} of 1,000": [foreign()],
        f"saliency, 8 probes, {len(methods)} methods": [SaliencySnapshots(methods)],
        "all of these": [CalibrationMonitor(), TemperatureScaling(), foreign(), SaliencySnapshots(methods)],
    }


def in_distribution() -> list[Row]:
    """A validation epoch with calibration and OOD scores of its own data (8 foreign samples) over one without."""
    rows: list[Row] = []
    for subject, repeats, detects in (
        (Subject("cnn", 250, batches=8, size=28, channels=1), 11, False),
        (Subject("cnn", 250, batches=40, size=28, channels=1), 7, False),  # 3,136 features: a fit takes seconds
        (Subject("resnet", 250, batches=8, width=16), 7, True),
        (Subject("resnet", 250, batches=4, width=64), 4, True),
    ):
        case = f"{subject.name}, {len(subject.x):,} samples"
        progress(f"in_distribution: {case}")
        both = "CalibrationMonitor, OODMonitor with 4 scores"
        watching: dict[str, list[Any]] = {
            "none": [],
            "CalibrationMonitor": [CalibrationMonitor()],
            "OODMonitor with 4 scores": [_watching(subject)],
            both: [CalibrationMonitor(), _watching(subject)],
        }
        if detects:
            watching[f"{both} and mahalanobis, fitted before"] = [CalibrationMonitor(), _fitted_before(subject)]
        seconds = interleaved(_validations(subject, watching), repeats)
        rows += compared("in_distribution", case, seconds, "none", {what: 1.03 for what in watching if both in what})
    return rows


def _watching(subject: Subject, **settings: Any) -> OODMonitor:
    return OODMonitor({"few": TensorDataset(subject.x[:FEW])}, max_samples=FEW, **settings)


def _fitted_before(subject: Subject) -> OODMonitor:
    """Its detector comes from a checkpoint, as in ``Trainer.test``; what a fit costs is no cost of the evaluation."""
    data = TensorDataset(subject.x[:FITTED_ON], subject.y[:FITTED_ON])
    fitting = _watching(subject, detectors=["mahalanobis"], fit_data=data, fit_samples=FITTED_ON)
    trainer(fitting).validate(Plain(subject.net()), subject.loader, verbose=False)
    scoring = _watching(subject, detectors=["mahalanobis"])
    assert fitting.detecting is not None
    assert scoring.detecting is not None
    scoring.detecting.remember(fitting.detecting.state())
    vars(scoring.detecting)["forget"] = lambda: None  # features are looked for once a run, not once an evaluation
    check = trainer(scoring)
    check.validate(Plain(subject.net()), subject.loader, verbose=False)
    if "ood/val/few/mahalanobis_auroc" not in check.callback_metrics:
        raise RuntimeError("the detector that was fitted before scored nothing; its time says nothing.")
    return scoring


def corruptions() -> list[Row]:
    """A cell of CorruptionMonitor, of five severities a corruption and 250 pictures, over a plain forward of these."""
    subject = Subject("resnet", 250, width=16)
    net = subject.net().eval()
    monitors = {corruption: [_corrupted(corruption, len(subject.x))] for corruption in CORRUPTIONS}
    progress(f"corruptions: {len(monitors)}, {subject.name}")

    def forward() -> None:
        with torch.inference_mode():
            net(subject.x)

    seconds = interleaved({"plain forward": forward, **_validations(subject, {"none": [], **monitors})}, 4)
    without = seconds.pop("none")
    cells = {
        what: [(own - base) / len(SEVERITIES) for own, base in zip(seconds[what], without, strict=True)]
        for what in monitors
    }
    return compared("corruptions", subject.name, {**cells, "plain forward": seconds["plain forward"]}, "plain forward")


def _corrupted(corruption: str, samples: int) -> CorruptionMonitor:
    monitor = CorruptionMonitor(corruptions=[corruption], max_samples=samples)
    vars(monitor)["_draw"] = lambda *_: None  # without a logger the heat map is saved in the working directory
    return monitor
