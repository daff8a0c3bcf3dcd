"""Waveforms `(N, 1, T)` in [-1, 1] and 1-d convolutions."""

import pytorch_lightning as pl
import torch
from compatibility.common import NO_CORRUPTIONS, NO_PICTURES, Shape, batches, labels, rows
from torch import nn
from torch.nn import functional as F

from lightning_robust import PixelSpace

SHAPE = Shape(
    "waveforms `(N, 1, T)` in [-1, 1] and 1-d convolutions",
    pixels=PixelSpace(bounds=(-1, 1)),
    says={"ood": NO_PICTURES, "shift": NO_CORRUPTIONS},
)


def train_loader():
    return batches(lambda seed: [(0.3 * rows(seed=seed, width=32)).tanh()[:, None], labels()])


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(1, 4, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(56, 3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
