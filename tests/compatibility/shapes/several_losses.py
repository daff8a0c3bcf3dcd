"""A coarse and a fine head with a loss each, and an L2 term."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, features, pairs
from torch import nn
from torch.nn import functional as F

SHAPE = Shape("a coarse and a fine head with a loss each, and an L2 term")
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.fine, self.coarse = features(), nn.Linear(8, 3), nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = self.body(x)
        loss = F.cross_entropy(self.fine(z), y) + F.cross_entropy(self.coarse(z), (y > 0).long())
        return loss + 1e-4 * sum(p.square().sum() for p in self.parameters())

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.fine(self.body(x)), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
