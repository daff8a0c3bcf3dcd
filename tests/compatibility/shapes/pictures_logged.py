"""The step hands its pictures to a picture log, as numpy arrays, before the loss."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, conv_net, pairs
from torch.nn import functional as F

SHAPE = Shape("the step hands its pictures to a picture log, as numpy arrays, before the loss")
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.album = conv_net(), []

    def training_step(self, batch, batch_idx):
        x, y = batch
        if batch_idx == 0:
            self.album.append(x[0].permute(1, 2, 0).cpu().numpy().copy())
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
