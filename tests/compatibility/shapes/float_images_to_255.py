"""Float pictures from 0 to 255 that the network scales."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, batches, conv_net, images, labels
from torch.nn import functional as F

from lightning_robust import PixelSpace

SHAPE = Shape("float pictures from 0 to 255 that the network scales", pixels=PixelSpace(bounds=(0, 255)), eps=20.0)


def train_loader():
    return batches(lambda seed: [255 * images(seed=seed), labels()])


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def forward(self, x):
        return self.net(x / 127.5 - 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
