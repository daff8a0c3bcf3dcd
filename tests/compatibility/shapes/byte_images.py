"""Uint8 pictures that the step casts, `x.float() / 255`."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, batches, conv_net, images, labels
from torch.nn import functional as F

from lightning_robust import PixelSpace

SHAPE = Shape(
    "uint8 pictures that the step casts, `x.float() / 255`",
    pixels=PixelSpace(bounds=(0, 255)),
    eps=20.0,
)


def train_loader():
    return batches(lambda seed: [(images(seed=seed) * 255).to(torch.uint8), labels()])


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x.float() / 255), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x.float() / 255), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
