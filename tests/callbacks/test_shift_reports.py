"""Where the numbers and pictures of CorruptionMonitor go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import zoo
from callbacks import shift_by_hand as hand
from callbacks.shift_by_hand import data, trained
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_robust import CorruptionMonitor, PixelSpace
from lightning_robust.corruptions import CORRUPTIONS, shift_heat_map

HEADLINES = {
    "clean_accuracy",
    "sampled_accuracy",
    "retention",
    "worst_accuracy",
    *(f"mean_{metric}" for metric in ("accuracy", "nll", "ece", "ece_floor", "ece_scaled", "msp_auroc")),
}
PICTURES = ("accuracy_by_corruption", "ece_scaled_by_corruption")


def monitor(**settings: Any) -> CorruptionMonitor:
    return CorruptionMonitor(**{"corruptions": ["fog", "contrast"], "severities": [1, 5], **settings})


def events(trainer: pl.Trainer) -> EventAccumulator:
    assert trainer.logger is not None
    for logger in trainer.loggers:
        logger.finalize("success")
    found = EventAccumulator(trainer.logger.log_dir or "", size_guidance={"images": 0, "scalars": 0})
    return found.Reload()


def test_headlines_are_few_and_single_cells_go_to_the_loggers(tmp_path: Path) -> None:
    logger = pl.loggers.TensorBoardLogger(tmp_path)
    callback = CorruptionMonitor(per_epoch=3, max_samples=20)
    trainer = zoo.trainer(callbacks=[callback], logger=logger, max_epochs=2)
    trainer.fit(trained(), data(), data())
    assert {k.removeprefix("shift/val/") for k in trainer.callback_metrics if k.startswith("shift")} == HEADLINES
    seen = events(trainer)
    scalars = [tag for tag in seen.Tags()["scalars"] if tag.startswith("shift")]
    cells = 5 * (len(CORRUPTIONS) - 1)  # grey pictures have no saturate
    assert len(scalars) == len(HEADLINES) + 2 + 8 * (cells + 1)
    accuracies = [seen.Scalars(f"shift/val/{cell.key}/accuracy") for cell in callback._sampled(callback.cells)]
    assert {len(points) for points in accuracies} == {2}
    mean = sum(points[-1].value for points in accuracies) / 3
    assert mean == pytest.approx(float(trainer.callback_metrics["shift/val/sampled_accuracy"]))
    lightnings = seen.Scalars("shift/val/sampled_accuracy")
    assert len(lightnings) == 2
    once = [point.step for point in seen.Scalars("shift/val/snow_1/ece")]
    assert once == [lightnings[-1].step]  # the last validation alone


def test_heat_maps_stand_in_tensorboard_in_the_last_validation(tmp_path: Path) -> None:
    trainer = zoo.trainer(callbacks=[monitor()], logger=pl.loggers.TensorBoardLogger(tmp_path), max_epochs=2)
    trainer.fit(trained(), data(), data())
    seen = events(trainer)
    assert set(seen.Tags()["images"]) == {f"shift/val/{tag}" for tag in PICTURES}
    assert [len(seen.Images(f"shift/val/{tag}")) for tag in PICTURES] == [1, 1]


def test_without_a_logger_heat_maps_of_a_validation_are_files_that_show_the_cells(tmp_path: Path) -> None:
    callback = monitor()
    trainer = zoo.trainer(callbacks=[callback], default_root_dir=tmp_path)
    module = trained()
    trainer.validate(module, data(), verbose=False)
    with Image.open(tmp_path / "shift" / "val" / "accuracy_by_corruption.png") as file:
        found = torch.from_numpy(np.array(file))
    values = {
        (name, severity): hand.by_hand(module.net, name, severity, hand.N, None)["accuracy"]
        for name in ("fog", "contrast")
        for severity in (1, 5)
    }
    x, y = hand.pictures()
    clean = float((torch.from_numpy(hand.logits_of(module.net, x)).argmax(1) == y).double().mean())
    expected = shift_heat_map(values, "val: accuracy", clean=clean)
    assert torch.equal(found, (expected * 255).round().to(torch.uint8).permute(1, 2, 0))
    assert (tmp_path / "shift" / "val" / "ece_scaled_by_corruption.png").is_file()
    trainer.test(module, data(), verbose=False)  # which leaves no files behind
    assert not (tmp_path / "shift" / "test").exists()


def test_two_of_them_with_names_do_not_mix_and_without_names_are_refused() -> None:
    normal, strong = monitor(), monitor(severities=[5], name="strong", seed=3)
    trainer = zoo.trainer(callbacks=[normal, strong])
    trainer.validate(trained(), data(), verbose=False)
    assert {"shift/val/mean_accuracy", "shift.strong/val/mean_accuracy"} <= set(trainer.callback_metrics)
    with pytest.raises(ValueError, match=r"both write shift/...; give one of them a name"):
        zoo.trainer(callbacks=[monitor(), monitor()]).validate(trained(), data(), verbose=False)


def test_stages_are_kept_apart() -> None:
    trainer = zoo.trainer(callbacks=[monitor(stages=["test"])])
    trainer.validate(trained(), data(), verbose=False)
    assert not any(key.startswith("shift") for key in trainer.callback_metrics)
    trainer.test(trained(), data(), verbose=False)
    assert "shift/test/mean_accuracy" in trainer.callback_metrics


def test_the_settings_that_decide_the_numbers_are_logged(tmp_path: Path) -> None:
    settings = monitor(pixels=PixelSpace(bounds=(0, 1)), max_samples=7).settings()
    assert settings["corruptions"] == "fog, contrast"
    assert settings["max_samples"] == 7
    assert settings["pixels"] == PixelSpace()
