"""Manual optimisation with two optimizers in turn: a classifier, then a generator against it."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, conv_net, pairs
from torch import nn
from torch.nn import functional as F

SHAPE = Shape("manual optimisation with two optimizers in turn: a classifier, then a generator against it")
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.generator, self.automatic_optimization = conv_net(), nn.Linear(4, 64), False

    def training_step(self, batch, batch_idx):
        x, y = batch
        classifier, generator = self.optimizers()
        loss = F.cross_entropy(self.net(x), y)
        classifier.zero_grad()
        self.manual_backward(loss)
        classifier.step()
        made = self.generator(torch.randn(len(x), 4)).sigmoid().view_as(x)
        loss = F.cross_entropy(self.net(made), y)
        generator.zero_grad()
        self.manual_backward(loss)
        generator.step()

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1), torch.optim.SGD(self.generator.parameters(), lr=0.1)
