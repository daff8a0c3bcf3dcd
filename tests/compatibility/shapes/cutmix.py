"""Cutmix with torch's random numbers, two losses weighted by area."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, conv_net, pairs
from torch.nn import functional as F

SHAPE = Shape("cutmix with torch's random numbers, two losses weighted by area")
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def training_step(self, batch, batch_idx):
        x, y = batch
        order, (i, j) = torch.randperm(len(x)), torch.randint(0, 4, (2,)).tolist()
        mixed = x.clone()
        mixed[:, :, i : i + 4, j : j + 4] = x[order, :, i : i + 4, j : j + 4]
        logits = self.net(mixed)
        return 0.75 * F.cross_entropy(logits, y) + 0.25 * F.cross_entropy(logits, y[order])

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
