"""Two validation loaders and `dataloader_idx`."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, conv_net, pairs
from torch.nn import functional as F

SHAPE = Shape("two validation loaders and `dataloader_idx`")
train_loader = pairs


def val_loader():
    return [pairs(), pairs(8)]


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
