"""The same, unpacked without a look at the mode: such a step runs in train mode only."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, features, pairs
from torch import nn
from torch.nn import functional as F

SHAPE = Shape(
    "the same, unpacked without a look at the mode: such a step runs in train mode only",
)
train_loader = val_loader = pairs


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.auxiliary = features(), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        z = self.body(x)
        return (self.head(z), self.auxiliary(z)) if self.training else self.head(z)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, batch_idx):
        x, y = batch
        main, auxiliary = self.net(x)
        return F.cross_entropy(main, y) + 0.3 * F.cross_entropy(auxiliary, y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
