"""What drift looks like: a run that is fine, one whose data gain a watermark half way, one with a wrong learning rate.

``python -m tests.benchmarks.drift [FOLDER]`` trains the three on the demo's digits, prints a table and leaves runs for
``tensorboard --logdir FOLDER``.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_robust import SaliencySnapshots
from lightning_robust.demo import Classifier, Digits

RUNS = ("fine", "watermark", "wrong rate")
EPOCHS, GAINED, NOISE = 12, 7, 0.7
SHOWN = (
    "val/accuracy",
    "saliency/val_gradient/iou10_skill_to_previous",
    "saliency/val_gradient/iou10_skill_to_anchor",
    "saliency/val_gradient/mass_on_border",
    "saliency/val_gradient/gini",
    "saliency/val_gradient/alarm",
    "saliency/val/flips",
)


def stamped(x: Tensor, y: Tensor) -> Tensor:
    """Digits with a white square of 2x2 at the upper edge, further to the right the larger the digit is."""
    x, rows = x.clone(), torch.arange(len(x))
    for down in (1, 2):
        for right in (4, 5):
            x[rows, :, down, right + 2 * y] = 1.0
    return x


class NoisyDigits(Digits):
    """Digits that are hard to read: noise in training, from a generator of its own.

    Args:
        gained: From this epoch on a stamp gives the class away, in training and in validation (see :func:`stamped`).
    """

    def __init__(self, gained: float = float("inf")) -> None:
        super().__init__()
        self.gained, self.generator = gained, torch.Generator().manual_seed(0)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        if self.trainer is not None and self.trainer.current_epoch + 1 >= self.gained:
            x = stamped(x, y)
        if self.trainer is not None and self.trainer.training:
            x = x + NOISE * torch.randn(x.shape, generator=self.generator)
        return x, y


class Constant(Classifier):
    """Without a cycle, at whose end nothing moves any more, whatever the data."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class History(pl.Callback):
    def __init__(self) -> None:
        self.rows: list[list[float]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.rows.append([float(trainer.callback_metrics.get(key, float("nan"))) for key in SHOWN])


def run(name: str, folder: str) -> list[list[float]]:
    pl.seed_everything(0, verbose=False)
    history = History()
    rate = 0.3 if name == "wrong rate" else 1e-3
    logger = pl.loggers.TensorBoardLogger(folder, name.replace(" ", "-"), version="")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=logger,
        enable_model_summary=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        callbacks=[SaliencySnapshots(["gradient", "integrated_gradients", "gradcam"], budget=None), history],
    )
    trainer.fit(Constant(rate, width=16), datamodule=NoisyDigits(GAINED if name == "watermark" else float("inf")))
    return history.rows


def main(folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in sys.argv[2:] or RUNS:
        print(f"\n{name}\n| epoch | " + " | ".join(key.removeprefix("saliency/") for key in SHOWN) + " |")
        print("|---:|" + "---:|" * len(SHOWN))
        for epoch, row in enumerate(run(name, folder), 1):
            print(f"| {epoch} | " + " | ".join(f"{value:.2f}" for value in row) + " |")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/drift")
