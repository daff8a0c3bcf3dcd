"""An object of the user's own with `to` and methods."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, batches, conv_net, images, labels
from torch.nn import functional as F

SHAPE = Shape("an object of the user's own with `to` and methods", inputs=(("x",),))


class Sample:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, device, **_):
        self.x, self.y = self.x.to(device), self.y.to(device)
        return self

    def __len__(self):
        return len(self.y)


def train_loader():
    return batches(lambda seed: Sample(images(seed=seed), labels()))


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch.x), batch.y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch.x), batch.y), batch_size=len(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
