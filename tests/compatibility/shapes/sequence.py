"""Sequences `(N, T, F)` and an LSTM."""

import pytorch_lightning as pl
import torch
from compatibility.common import NO_BOX, NO_CORRUPTIONS, NO_PICTURES, Shape, batches, labels, rows
from torch import nn
from torch.nn import functional as F

SHAPE = Shape("sequences `(N, T, F)` and an LSTM", pixels=NO_BOX, says={"ood": NO_PICTURES, "shift": NO_CORRUPTIONS})


def train_loader():
    return batches(lambda seed: [rows(seed=seed, width=20).view(8, 5, 4), labels()])


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

    def net(self, x):
        output, _state = self.lstm(x)
        return self.head(output[:, -1])

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
