"""A module of `lightning.pytorch` under its own Trainer."""

import lightning.pytorch as lp
import torch
from compatibility.common import Shape, conv_net, pairs
from torch.nn import functional as F

SHAPE = Shape("a module of `lightning.pytorch` under its own Trainer", namespace="lightning.pytorch")
train_loader = val_loader = pairs


class Module(lp.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
