"""A torchmetrics object that is updated before the loss."""

import pytorch_lightning as pl
import torch
import torchmetrics
from compatibility.common import Shape, conv_net, pairs
from torch.nn import functional as F

SHAPE = Shape("a torchmetrics object that is updated before the loss")
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.brightness = conv_net(), torchmetrics.MeanMetric()

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.brightness.update(x.mean())
        self.log("brightness", self.brightness)
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.brightness.update(x.mean())
        self.log("val_brightness", self.brightness)
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
