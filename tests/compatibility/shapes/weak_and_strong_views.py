"""Nested pairs `((weak, strong), y)`, a supervised loss first and a consistency loss after it."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, batches, conv_net, images, labels
from torch.nn import functional as F

SHAPE = Shape(
    "nested pairs `((weak, strong), y)`, a supervised loss first and a consistency loss after it", inputs=((0, 0),)
)


def train_loader():
    return batches(lambda seed: ((images(seed=seed), images(seed=seed + 9)), labels()))


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def training_step(self, batch, batch_idx):
        (weak, strong), y = batch
        logits = self.net(weak)
        supervised = F.cross_entropy(logits, y)
        pseudo = logits.detach().argmax(1)
        return supervised + 0.5 * F.cross_entropy(self.net(strong), pseudo)

    def validation_step(self, batch, batch_idx):
        (weak, _), y = batch
        self.log("val_loss", F.cross_entropy(self.net(weak), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
