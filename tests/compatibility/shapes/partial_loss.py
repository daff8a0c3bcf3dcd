"""A `functools.partial` of a bare import as the loss."""

import functools

import pytorch_lightning as pl
import torch
from compatibility.common import (
    Shape,
    conv_net,
    pairs,
)

SHAPE = Shape("a `functools.partial` of a bare import as the loss")
train_loader = val_loader = pairs
criterion = functools.partial(torch.nn.functional.cross_entropy, ignore_index=-1)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return criterion(input=self.net(x), target=y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", criterion(input=self.net(x), target=y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
