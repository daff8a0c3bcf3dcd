"""A LightningModule inside of a LightningModule, whose `training_step` is called."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, conv_net, pairs
from torch.nn import functional as F

SHAPE = Shape("a LightningModule inside of a LightningModule, whose `training_step` is called")
train_loader = val_loader = pairs


class Inner(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("inner_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        return self.training_step(batch, batch_idx)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.inner = Inner()
        self.inner.log = self.log

    def training_step(self, batch, batch_idx):
        return self.inner.training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.inner.validation_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
