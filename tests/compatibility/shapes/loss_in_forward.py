"""The network's forward takes labels and returns the loss."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, conv_net, pairs
from torch import nn
from torch.nn import functional as F

SHAPE = Shape("the network's forward takes labels and returns the loss")
train_loader = val_loader = pairs


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = conv_net()

    def forward(self, x, y=None):
        logits = self.body(x)
        return logits if y is None else (F.cross_entropy(logits, y), logits)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, batch_idx):
        return self.net(*batch)[0]

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(*batch)[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
