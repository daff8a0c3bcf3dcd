"""An object with slots."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, batches, conv_net, images, labels
from torch.nn import functional as F

SHAPE = Shape("an object with slots", inputs=(("x",),))


class Sample:
    __slots__ = ("x", "y")

    def __init__(self, x, y):
        self.x, self.y = x, y


def train_loader():
    return batches(lambda seed: Sample(images(seed=seed), labels()))


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch.x), batch.y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch.x), batch.y), batch_size=8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
