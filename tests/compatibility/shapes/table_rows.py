"""Rows of a table and an MLP; foreign rows are named."""

import pytorch_lightning as pl
import torch
from compatibility.common import NO_BOX, NO_CORRUPTIONS, Shape, batches, labels, rows
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

SHAPE = Shape(
    "rows of a table and an MLP; foreign rows are named",
    pixels=NO_BOX,
    says={"shift": NO_CORRUPTIONS},
)


def train_loader():
    return batches(lambda seed: [rows(seed=seed), labels()])


def foreign():
    return TensorDataset(5 * rows(seed=9), labels())


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
