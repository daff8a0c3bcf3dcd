"""A torchmetrics object as criterion: its update calls `F.cross_entropy`."""

import pytorch_lightning as pl
import torch
import torchmetrics
from compatibility.common import Shape, conv_net, pairs
from torch.nn import functional as F

SHAPE = Shape("a torchmetrics object as criterion: its update calls `F.cross_entropy`")
train_loader = val_loader = pairs


class MeanLoss(torchmetrics.Metric):
    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("n", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, logits, y):
        self.total = self.total + F.cross_entropy(logits, y, reduction="sum")
        self.n = self.n + len(y)

    def compute(self):
        return self.total / self.n


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.criterion = conv_net(), MeanLoss()

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = self.criterion(self.net(x), y)
        self.criterion.reset()
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", self.criterion(self.net(x), y))
        self.criterion.reset()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
