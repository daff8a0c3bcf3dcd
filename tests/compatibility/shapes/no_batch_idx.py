"""Steps that take the batch only."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, conv_net, pairs
from torch.nn import functional as F

SHAPE = Shape("steps that take the batch only")
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
