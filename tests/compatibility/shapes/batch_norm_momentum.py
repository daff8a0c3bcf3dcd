"""BatchNorm with a momentum of its own, cumulative averages and running statistics switched off."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, pairs
from torch import nn
from torch.nn import functional as F

SHAPE = Shape("BatchNorm with a momentum of its own, cumulative averages and running statistics switched off")
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4, momentum=None),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4, momentum=0.9),
            nn.Flatten(),
            nn.Linear(64, 8),
            nn.BatchNorm1d(8, track_running_stats=False),
            nn.Linear(8, 3),
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
