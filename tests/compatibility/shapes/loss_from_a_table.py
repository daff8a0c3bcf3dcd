"""A loss chosen by name from a dict of functions."""

import functools

import pytorch_lightning as pl
import torch
from compatibility.common import (
    Shape,
    conv_net,
    pairs,
)
from torch.nn import functional as F

SHAPE = Shape("a loss chosen by name from a dict of functions")
train_loader = val_loader = pairs
LOSSES = {"ce": F.cross_entropy, "smooth": functools.partial(F.cross_entropy, label_smoothing=0.1)}


class Module(pl.LightningModule):
    def __init__(self, loss="smooth"):
        super().__init__()
        self.net, self.loss = conv_net(), LOSSES[loss]

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", self.loss(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
