"""A step without `batch_idx` under the user's own decorator (`functools.wraps`)."""

import functools

import pytorch_lightning as pl
import torch
from compatibility.common import (
    Shape,
    conv_net,
    pairs,
)
from torch.nn import functional as F

SHAPE = Shape("a step without `batch_idx` under the user's own decorator (`functools.wraps`)")
train_loader = val_loader = pairs


def timed(step):
    @functools.wraps(step)
    def wrapper(self, *args, **kwargs):
        self.calls += 1
        return step(self, *args, **kwargs)

    return wrapper


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.calls = conv_net(), 0

    @timed
    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
