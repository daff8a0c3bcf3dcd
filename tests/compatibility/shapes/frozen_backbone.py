"""A frozen backbone (`requires_grad` off, eval mode) and a head that learns."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, features, pairs
from torch import nn
from torch.nn import functional as F

SHAPE = Shape("a frozen backbone (`requires_grad` off, eval mode) and a head that learns")
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.head = features().requires_grad_(False), nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.body.eval()
        return F.cross_entropy(self.head(self.body(x)), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.head(self.body(x)), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.1)
