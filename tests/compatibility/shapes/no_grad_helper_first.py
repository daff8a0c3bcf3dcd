"""A helper under `torch.no_grad` that calls the network before the real forward."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, conv_net, pairs
from torch.nn import functional as F

SHAPE = Shape("a helper under `torch.no_grad` that calls the network before the real forward")
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def confident(self, x):
        with torch.no_grad():
            return self.net(x).softmax(1).amax(1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        weight = 1.5 - self.confident(x)
        return (F.cross_entropy(self.net(x), y, reduction="none") * weight).mean()

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
