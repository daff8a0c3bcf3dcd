"""Normalised in `on_after_batch_transfer` of the module."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, conv_net, pairs
from torch.nn import functional as F

from lightning_robust import PixelSpace

SHAPE = Shape("normalised in `on_after_batch_transfer` of the module", pixels=PixelSpace(mean=0.3, std=0.2))
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return (x - 0.3) / 0.2, y

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
