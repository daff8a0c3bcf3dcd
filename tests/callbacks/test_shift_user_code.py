"""Corruptions of what strangers' modules take: other units, channels, heads, losses and precisions."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import zoo
from callbacks import shift_by_hand as hand
from callbacks.shift_by_hand import N, data, pictures, trained
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import CorruptionMonitor, PixelSpace
from lightning_robust.corruptions import CORRUPTIONS, corrupt

FOG = ("fog", 5)


def fog(**settings: Any) -> CorruptionMonitor:
    return CorruptionMonitor(**{"corruptions": ["fog"], "severities": [5], **settings})


def validated(module: Any, callback: Any, loader: Any, **settings: Any) -> dict[str, float]:
    trainer = zoo.trainer(callbacks=[callback], **settings)
    trainer.validate(module, loader, verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("shift")}


def around(wrap: Any) -> Any:
    """The trained net behind another unit of pixels."""

    class Wrapped(hand.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(wrap(x))

    module = zoo.built(Wrapped)
    module.load_state_dict(trained().state_dict())
    return module


UNITS: dict[str, tuple[Any, Any, PixelSpace]] = {
    "normalised": (lambda x: (x - 0.4) / 0.25, lambda x: x * 0.25 + 0.4, PixelSpace(mean=0.4, std=0.25)),
    "0 to 255": (lambda x: 255 * x, lambda x: x / 255, PixelSpace(bounds=(0, 255))),
    "-1 to 1": (lambda x: 2 * x - 1, lambda x: (x + 1) / 2, PixelSpace(bounds=(-1, 1))),
}


@pytest.mark.parametrize(("there", "back", "pixels"), UNITS.values(), ids=UNITS)
def test_the_same_pixels_are_corrupted_alike_in_any_unit(there: Any, back: Any, pixels: PixelSpace) -> None:
    x, y = pictures()
    callback = fog(pixels=pixels)
    validated(around(back), callback, DataLoader(TensorDataset(there(x), y), 8))
    expected = hand.by_hand(trained().net, *FOG, N, None)
    found = callback.section()["shift"]["cells"]["fog_5"]
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-4)


def test_bytes_that_the_step_casts_are_corrupted_as_the_pixels_that_they_stand_for() -> None:
    x, y = pictures()
    x = (255 * x).to(torch.uint8)
    callback = fog(pixels=PixelSpace(bounds=(0, 255)))
    validated(around(lambda x: x.float() / 255), callback, DataLoader(TensorDataset(x, y), 8))
    made = corrupt(x.float() / 255, *FOG, index=range(N))
    clean = hand.logits_of(trained().net, x.float() / 255)
    expected = hand.measured(trained().net, made, y, clean, None)
    found = callback.section()["shift"]["cells"]["fog_5"]
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-4)


def test_a_step_that_tells_bytes_from_numbers_gets_corrupted_bytes() -> None:
    x, y = pictures()
    x = (255 * x).to(torch.uint8)
    callback = fog()
    module = around(lambda x: x.float() / 255 if x.dtype == torch.uint8 else x)
    validated(module, callback, DataLoader(TensorDataset(x, y), 8))
    made = (255 * corrupt(x.float() / 255, *FOG, index=range(N))).round() / 255
    expected = hand.measured(trained().net, made, y, hand.logits_of(trained().net, x.float() / 255), None)
    found = callback.section()["shift"]["cells"]["fog_5"]
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=2e-2)
    assert found["accuracy"] == pytest.approx(expected["accuracy"])


def test_data_in_other_units_than_said_stop_the_fit_before_its_first_step() -> None:
    x, y = pictures()
    loader = DataLoader(TensorDataset(255 * x, y), 8)
    trainer = zoo.trainer(callbacks=[fog()])
    with pytest.raises(ValueError, match=r"within \[0, 1\], got .*look like 0..255.*bounds=\(0, 255\)"):
        trainer.fit(trained(), loader, loader)
    assert trainer.global_step == 0


def test_grey_pictures_lose_saturate_unless_it_is_named() -> None:
    callback = CorruptionMonitor(severities=[3])
    validated(trained(), callback, data())
    cells = set(callback.section()["shift"]["cells"])
    assert cells == {"clean", *(f"{name}_3" for name in CORRUPTIONS if name != "saturate")}
    with pytest.raises(ValueError, match="three channels for 'saturate', got 1"):
        zoo.trainer(callbacks=[CorruptionMonitor(corruptions=["saturate"])]).fit(trained(), data(), data())


class Coloured(hand.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 10))


def test_colour_pictures_take_all_corruptions() -> None:
    callback = CorruptionMonitor(severities=[3])
    validated(zoo.built(Coloured), callback, data(channels=3))
    assert set(callback.section()["shift"]["cells"]) == {"clean", *(f"{name}_3" for name in CORRUPTIONS)}


class Table(hand.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 10)


class Tokens(hand.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(40, 10))


OTHERS: dict[str, tuple[Any, Any, str]] = {
    "table": (Table, lambda n: torch.rand(n, 64), r"float32 \(8, 64\)"),
    "tokens": (Tokens, lambda n: torch.arange(5 * n).view(n, 5) % 20, r"int64 \(8, 5\)"),
}


@pytest.mark.parametrize(("module", "make", "what"), OTHERS.values(), ids=OTHERS)
def test_what_is_no_picture_is_said_once_and_loaders_of_other_data_are_measured(
    module: Any, make: Any, what: str
) -> None:
    built, x = zoo.built(module), make(24)
    loader, other = (DataLoader(TensorDataset(v, torch.arange(24) % 4), 8) for v in (x, x.flip(1)))
    callback = CorruptionMonitor(shift_loaders={"other": other})
    trainer = zoo.trainer(callbacks=[callback], max_epochs=2)
    with pytest.warns(UserWarning, match=rf"made for pictures .*the input is {what}.*shift_loaders=") as said:
        trainer.fit(built, loader, loader)
    assert len([w for w in said if "made for pictures" in str(w.message)]) == 1
    z = hand.logits_of(built.net, x.flip(1))
    expected = float(np.mean(z.argmax(1) == np.arange(24) % 4))
    assert float(trainer.callback_metrics["shift/val/other/accuracy"]) == pytest.approx(expected)
    assert "shift/val/mean_accuracy" not in trainer.callback_metrics


class Dense(hand.Module):
    """A class for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(1, 4, 3, padding=1)


def test_each_pixel_is_a_prediction_and_those_without_a_label_are_none() -> None:
    module, (x, _) = zoo.built(Dense), pictures(20)
    y = (4 * x[:, 0]).long().clamp(max=3)
    y[:, 0] = -100
    callback = fog(max_samples=13)
    validated(module, callback, DataLoader(TensorDataset(x, y), 8))
    found, kept = callback.section()["shift"], y[:13].flatten() != -100
    rows = {}
    for key, inputs in (("clean", x[:13]), ("fog_5", corrupt(x[:13], *FOG, index=range(13)))):
        with torch.no_grad():
            rows[key] = module.net(inputs).movedim(1, -1).reshape(-1, 4)[kept].double().numpy()
    labels = y[:13].flatten()[kept]
    for key, z in rows.items():
        expected = {"accuracy": float(np.mean(z.argmax(1) == labels.numpy())), "nll": hand.nll(z, labels)}
        expected |= {"ece": hand.ece(z, labels), "ece_scaled": hand.ece(z, labels, found["temperature"])}
        assert {name: found["cells"][key][name] for name in expected} == pytest.approx(expected, abs=1e-5), key
        assert "msp_auroc" not in found["cells"][key]  # a sample is no single prediction
    assert found["n"] == len(labels) == 13 * 56


class Masked(Dense):
    """Takes the pixels without a label out before its loss."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch[:2]
        there = y >= 0
        self.log("val_loss", F.cross_entropy(self(x).movedim(1, -1)[there], y[there]))


def masked_data(x: Tensor, size: int = 8) -> DataLoader[Any]:
    y = (4 * x[:, 0]).long().clamp(max=3)
    y[torch.rand(y.shape, generator=torch.Generator().manual_seed(0)) < 0.4] = -100
    return DataLoader(TensorDataset(x, y, torch.arange(len(x)) % 2), size)


def test_where_a_step_drops_rows_whole_batches_are_measured_without_groups() -> None:
    module, (x, _) = zoo.built(Masked), pictures(20)
    callback = fog(max_samples=13, group_key=2)
    with pytest.warns(UserWarning, match=r"drops rows before its loss.*rows for 8 samples.*whole.*first 13") as said:
        metrics = validated(module, callback, masked_data(x))
    assert len([w for w in said if "drops rows" in str(w.message)]) == 1
    y = masked_data(x).dataset[:8][1]
    found = callback.section()["shift"]
    assert found["n"] == int((y >= 0).sum())
    for key, inputs in (("clean", x[:8]), ("fog_5", corrupt(x[:8], *FOG, index=range(8)))):
        with torch.no_grad():
            right = module.net(inputs).argmax(1)[y >= 0] == y[y >= 0]
        assert found["cells"][key]["accuracy"] == pytest.approx(float(right.double().mean())), key
    assert not [key for key in metrics if "group" in key]


def test_where_a_step_drops_rows_a_first_batch_that_is_too_large_stops_the_fit() -> None:
    module, (x, _) = zoo.built(Masked), pictures(20)
    trainer = zoo.trainer(callbacks=[fog(max_samples=7)])
    with pytest.raises(ValueError, match=r"max_samples=7 is less than the first one; give max_samples=8 or more"):
        trainer.fit(module, masked_data(x), masked_data(x))
    assert trainer.global_step == 0
    with pytest.raises(ValueError, match="max_samples=7 is less"):
        validated(module, fog(max_samples=7), masked_data(x))


class Labels(hand.Module):
    """Several labels a picture."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


def test_each_of_several_labels_is_a_prediction() -> None:
    module, (x, y) = zoo.built(Labels), pictures(21)
    labels = F.one_hot(y, 10) + F.one_hot(y + 3, 10)
    callback = fog()
    validated(module, callback, DataLoader(TensorDataset(x, labels.float()), 8))
    z = hand.logits_of(module.net, corrupt(x, *FOG, index=range(21)))
    two = np.stack([-z.flatten() / 2, z.flatten() / 2], 1)
    found = callback.section()["shift"]["cells"]["fog_5"]
    expected = {"accuracy": float(np.mean((z > 0) == labels.numpy())), "ece": hand.ece(two, labels.flatten())}
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-5)


class LogProbabilities(hand.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.net(x), 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.nll_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


class Silent(hand.Module):
    """Validates without a loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return -self.net(batch[0]).log_softmax(1).gather(1, batch[1][:, None]).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (LogProbabilities, {}),
        (Silent, {"logits_fn": lambda module, batch: module.net(batch[0]), "target_key": 1}),
    ],
)
def test_log_probabilities_and_logits_by_hand_give_the_same_numbers(kind: Any, said: dict[str, Any]) -> None:
    module, callback = zoo.built(kind), fog(**said)
    module.load_state_dict(trained().state_dict())
    validated(module, callback, data())
    expected = hand.by_hand(module.net, *FOG, N, callback.section()["shift"]["temperature"])
    assert callback.section()["shift"]["cells"]["fog_5"] == pytest.approx(expected, abs=1e-5)


def test_log_probabilities_have_no_energy_and_it_is_said_once() -> None:
    module, callback = zoo.built(LogProbabilities), fog(scores=["energy", "msp"])
    with pytest.warns(UserWarning, match=r"nll_loss\) gets log-probabilities, which have no energy; use msp"):
        metrics = validated(module, callback, data())
    assert "shift/val/mean_msp_auroc" in metrics
    assert "shift/val/mean_energy_auroc" not in metrics


def test_predictions_that_are_nan_are_counted_and_said() -> None:
    x, y = pictures()
    fogged = corrupt(x, *FOG, index=range(N))
    limit = float(fogged.mean((1, 2, 3)).median())

    class Breaks(hand.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = self.net(x)
            return torch.where(x.mean((1, 2, 3))[:, None] > limit, z * torch.nan, z)

    module, callback = zoo.built(Breaks), fog()
    module.load_state_dict(trained().state_dict())
    good = fogged.mean((1, 2, 3)) <= limit
    bad = int((~good).sum()) + int((x.mean((1, 2, 3)) > limit).sum())
    with pytest.warns(UserWarning, match=rf"{bad} predictions of val are NaN or infinite and left out.*fog_5 26"):
        validated(module, callback, data())
    right = hand.logits_of(module.net, fogged[good]).argmax(1) == y[good].numpy()
    assert callback.section()["shift"]["cells"]["fog_5"]["accuracy"] == pytest.approx(float(right.mean()))


def test_a_cell_without_any_number_is_no_part_of_the_means_and_that_is_said() -> None:
    class Breaks(hand.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = self.net(x)
            return torch.where((x.std((1, 2, 3)) < 0.1)[:, None], z * torch.nan, z)

    module, callback = zoo.built(Breaks), CorruptionMonitor(corruptions=["fog", "contrast"], severities=[5])
    module.load_state_dict(trained().state_dict())
    with pytest.warns(UserWarning, match=r"nothing is left \(1\) are no part of any mean"):
        metrics = validated(module, callback, data())
    cells = callback.section()["shift"]["cells"]
    assert np.isnan(cells["contrast_5"]["accuracy"])
    for metric in ("mean_accuracy", "worst_accuracy", "sampled_accuracy"):
        assert metrics[f"shift/val/{metric}"] == pytest.approx(cells["fog_5"]["accuracy"])


def test_under_autocast_the_forwards_are_in_half_precision_and_the_pictures_are_not() -> None:
    module, callback = trained(), fog()
    validated(module, callback, data(), precision="bf16-mixed")
    x, y = pictures()
    made = corrupt(x, *FOG, index=range(N))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        z = module.net.eval()(made).double().numpy()
    found = callback.section()["shift"]["cells"]["fog_5"]
    expected = {"accuracy": float(np.mean(z.argmax(1) == y.numpy())), "nll": hand.nll(z, y), "ece": hand.ece(z, y)}
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=2e-3)
    assert found["nll"] != pytest.approx(hand.by_hand(module.net, *FOG, N, None)["nll"], abs=1e-7)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64)])
def test_other_precisions_measure_what_their_own_numbers_say(precision: Any, dtype: torch.dtype) -> None:
    module, callback = trained(), fog()
    validated(module, callback, data(), precision=precision)
    x, y = pictures()
    net = trained().net.to(dtype)
    with torch.no_grad():
        z = net.eval()(corrupt(x.to(dtype), *FOG, index=range(N))).double().numpy()
    assert callback.section()["shift"]["cells"]["fog_5"]["nll"] == pytest.approx(hand.nll(z, y), abs=1e-3)


def test_only_the_first_of_several_loaders_is_corrupted() -> None:
    class Both(hand.Module):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    module = zoo.built(Both)
    module.load_state_dict(trained().state_dict())
    x, y = pictures(11, seed=9)
    one, two = (validated(module, fog(), loaders) for loaders in (data(), [data(), DataLoader(TensorDataset(x, y), 8)]))
    assert one == two
    assert not any("/1" in key for key in two)


def test_a_failure_in_mid_run_costs_no_run_and_is_raised_if_asked_for() -> None:
    class Breaking(CorruptionMonitor):
        evaluations = 0

        def begin(self, trainer: Any, pl_module: Any, stage: str) -> None:
            super().begin(trainer, pl_module, stage)
            self.evaluations += 1

        def _read_corrupted(self, *arguments: Any) -> None:
            if self.evaluations == 2:
                raise ZeroDivisionError("its own fault.")
            super()._read_corrupted(*arguments)

    seen: list[dict[str, float]] = []

    class Seen(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                seen.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    settings: dict[str, Any] = {"corruptions": ["fog"], "per_epoch": 1}
    trainer = zoo.trainer(callbacks=[Breaking(**settings), Seen()], max_epochs=3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(zoo.built(hand.Module), data(), data())
    assert len([w for w in said if "failed in val at step 14: ZeroDivisionError" in str(w.message)]) == 1
    missing = [bool(np.isnan(logged["shift/val/sampled_accuracy"])) for logged in seen]
    assert missing == [False, True, False]
    with pytest.raises(ZeroDivisionError):
        zoo.trainer(callbacks=[Breaking(**settings, strict=True)], max_epochs=3).fit(
            zoo.built(hand.Module), data(), data()
        )
