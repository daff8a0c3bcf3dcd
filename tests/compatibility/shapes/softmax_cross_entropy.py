"""A softmax in the network and cross-entropy on it (one softmax too many)."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, conv_net, pairs
from torch import nn
from torch.nn import functional as F

SHAPE = Shape("a softmax in the network and cross-entropy on it (one softmax too many)", warns=(r"rows that sum to 1",))
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(conv_net(), nn.Softmax(1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
