"""No `forward` at all: encoder and head are called in the step."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, features, pairs
from torch import nn
from torch.nn import functional as F

SHAPE = Shape("no `forward` at all: encoder and head are called in the step")
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = features(), nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.head(self.encoder(x)), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.head(self.encoder(x)), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
