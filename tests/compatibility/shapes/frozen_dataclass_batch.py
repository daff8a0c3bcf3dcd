"""A frozen dataclass that moves itself."""

from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, batches, conv_net, images, labels
from torch.nn import functional as F

SHAPE = Shape("a frozen dataclass that moves itself", inputs=(("x",),))


@dataclass(frozen=True)
class Sample:
    x: torch.Tensor
    y: torch.Tensor

    def to(self, *args, **kwargs):
        return Sample(self.x.to(*args, **kwargs), self.y.to(*args, **kwargs))


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
