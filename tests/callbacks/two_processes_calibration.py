"""Calibration in one or two gloo processes, as a script: ``python two_processes_calibration.py PROCESSES RESULT.json``.

Everything is measured on 101 samples, which two processes cannot share evenly.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_robust import CalibrationMonitor, TemperatureScaling

SAMPLES = 101


def spoken(n: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(n, classes, generator=generator)
    return z, torch.multinomial((z / 1.8).softmax(1), 1, generator=generator)[:, 0]


class Said(pl.LightningModule):
    """The input is the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Identity())
        self.unused = nn.Parameter(torch.zeros(()))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch["logits"]), batch["label"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) + 0 * self.unused

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.loss(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Labels(Said):
    def loss(self, batch: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.net(batch[0]), batch[1])


class Sites(Dataset[Any]):
    """Site "odd" is the second process's alone, and the rarest is seen by the first process alone."""

    def __init__(self, n: int = SAMPLES, seed: int = 0) -> None:
        self.z, self.y = spoken(n, 4, seed)

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, i: int) -> Any:
        site = "odd" if i % 2 else "rare" if i < 20 else "even"
        return {"logits": self.z[i], "label": self.y[i], "site": site, "code": i % 2 * 3 + i % 5}


class Memory(pl.loggers.logger.DummyLogger):
    """What loggers are handed, by key, in a file: forked processes keep their memory to themselves."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.values: dict[str, float] = {}

    @pl.utilities.rank_zero_only
    def log_metrics(self, metrics: Any, *_: Any, **__: Any) -> None:
        self.values |= {key: float(value) for key, value in metrics.items()}
        self.path.write_text(json.dumps(self.values))


def main(processes: int, result: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings: dict[str, Any] = {"accelerator": "cpu", "devices": processes, **quiet}
    if processes > 1:
        settings["strategy"] = "ddp_fork"
    memory = Memory(result.with_suffix(".beside"))
    data = DataLoader(Sites(), 16)
    own = DataLoader(Sites(48, 3), 48)  # one batch: one process reads it
    monitors = [
        CalibrationMonitor(classwise=True, group_key="site"),
        CalibrationMonitor(group_key="code", name="codes"),
        everything := TemperatureScaling(
            methods=["vector", "isotonic"], prediction_sets=0.1, classwise=True, group_key="site"
        ),
        TemperatureScaling(split=0.4, methods=["vector"], name="split"),
        TemperatureScaling(dataloader=own, prediction_sets=0.2, group_key="code", name="own"),
        TemperatureScaling(dataloader=own.dataset, name="set"),
        TemperatureScaling(max_samples=60, group_key="site", classwise=True, name="few"),
    ]
    found: dict[str, float] = {}
    evaluation = pl.Trainer(callbacks=monitors, logger=memory, **settings)
    evaluation.validate(Said(), [data, DataLoader(Sites(33, 5), 8)], verbose=False)
    found |= {key: float(value) for key, value in evaluation.callback_metrics.items()}
    found |= {f"beside {key}": value for key, value in json.loads(memory.path.read_text()).items() if key not in found}

    # Of a single sample the second process has none.
    one = pl.Trainer(
        callbacks=[
            CalibrationMonitor(classwise=True, group_key="site"),
            TemperatureScaling(
                methods=["vector"], prediction_sets=0.5, classwise=True, group_key="site", dataloader=own
            ),
        ],
        logger=False,
        **settings,
    )
    one.validate(Said(), DataLoader(Subset(Sites(), [20]), 8), verbose=False)
    found |= {f"single {key}": float(value) for key, value in one.callback_metrics.items()}

    generator = torch.Generator().manual_seed(2)
    z, y = 3 * torch.randn(SAMPLES, 3, generator=generator), torch.rand(SAMPLES, 3, generator=generator).round()
    labels = DataLoader(TensorDataset(z, y), 16)
    callbacks = [CalibrationMonitor(mode="per_label"), TemperatureScaling(methods=["platt"], prediction_sets=0.1)]
    of_labels = pl.Trainer(callbacks=callbacks, logger=False, **settings)
    of_labels.validate(Labels(), labels, verbose=False)
    found |= {f"labels {key}": float(value) for key, value in of_labels.callback_metrics.items()}

    # A fit and a test with the file that it leaves; forked processes keep what they fitted to themselves.
    fitting = pl.Trainer(max_epochs=1, callbacks=[everything], logger=False, **settings)
    fitting.fit(module := Said(), DataLoader(Sites(32, 9), 16), data)
    fitting.save_checkpoint(path := result.with_suffix(".ckpt"))
    if processes == 1:
        saved = torch.load(path, weights_only=True)["lightning_robust"]["calibration"]
        assert set(saved["recalibrators"]) == {"vector", "isotonic"}
    testing = pl.Trainer(callbacks=[monitors[0], everything], logger=False, **settings)
    tested = result.parent / "1.ckpt"  # in both cases that of one process
    testing.test(module, DataLoader(Sites(77, 4), 16), ckpt_path=tested, verbose=False)
    found |= {key: float(value) for key, value in testing.callback_metrics.items()}
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
