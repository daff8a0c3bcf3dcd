"""Normalised in the step, in place."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, conv_net, pairs
from torch.nn import functional as F

SHAPE = Shape("normalised in the step, in place")
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def training_step(self, batch, batch_idx):
        x, y = batch
        x.sub_(0.3).div_(0.2)
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net((x - 0.3) / 0.2), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
