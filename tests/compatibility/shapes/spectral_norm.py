"""Layers under spectral norm, whose buffers move in every training forward."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, pairs
from torch import nn
from torch.nn import functional as F

SHAPE = Shape("layers under spectral norm, whose buffers move in every training forward")
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        normed = nn.utils.parametrizations.spectral_norm(nn.Linear(64, 8))
        self.net = nn.Sequential(nn.Flatten(), normed, nn.ReLU(), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
