"""Manual optimisation."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, conv_net, pairs
from torch.nn import functional as F

SHAPE = Shape("manual optimisation")
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.automatic_optimization = conv_net(), False

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = F.cross_entropy(self.net(x), y)
        self.manual_backward(loss)
        optimizer.step()

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
