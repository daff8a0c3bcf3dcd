"""Activations recomputed by `torch.utils.checkpoint`."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, features, pairs
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

SHAPE = Shape("activations recomputed by `torch.utils.checkpoint`")
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.head = features(), nn.Linear(8, 3)

    def net(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
