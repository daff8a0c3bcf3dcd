"""Normalised in the data set."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, batches, conv_net, images, labels
from torch.nn import functional as F

from lightning_robust import PixelSpace

SHAPE = Shape("normalised in the data set", pixels=PixelSpace(mean=0.3, std=0.2))


def train_loader():
    return batches(lambda seed: [(images(seed=seed) - 0.3) / 0.2, labels()])


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
