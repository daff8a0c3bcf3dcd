"""A teacher that is the moving average of the student, updated in `on_train_batch_end`."""

import copy

import pytorch_lightning as pl
import torch
from compatibility.common import (
    Shape,
    conv_net,
    pairs,
)
from torch.nn import functional as F

SHAPE = Shape("a teacher that is the moving average of the student, updated in `on_train_batch_end`")
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        with torch.no_grad():
            target = self.teacher(x).softmax(1)
        return F.cross_entropy(logits, y) + F.mse_loss(logits.softmax(1), target)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, 0.1)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)
