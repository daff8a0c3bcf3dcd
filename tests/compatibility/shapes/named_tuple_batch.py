"""A named tuple."""

from typing import NamedTuple

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, batches, conv_net, images, labels
from torch.nn import functional as F

SHAPE = Shape("a named tuple", inputs=(("image",),))


class Pair(NamedTuple):
    image: torch.Tensor
    label: torch.Tensor


def train_loader():
    return batches(lambda seed: Pair(images(seed=seed), labels()))


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net.forward(batch.image), batch.label)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch.image), batch.label))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
