"""A regression under `F.mse_loss`."""

import pytorch_lightning as pl
import torch
from compatibility.common import GROUPS, NO_LOSS, Shape, batches, rows
from torch import nn
from torch.nn import functional as F

SHAPE = Shape(
    "a regression under `F.mse_loss`",
    errors=dict.fromkeys(GROUPS, NO_LOSS),
)


def train_loader():
    return batches(lambda seed: [rows(seed=seed), rows(seed=seed).sum(1)])


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self.net(x).squeeze(1), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.mse_loss(self.net(x).squeeze(1), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
