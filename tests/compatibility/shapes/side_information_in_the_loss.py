"""A table of costs per sample that only a second term of the loss uses."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, batches, conv_net, images, labels
from torch.nn import functional as F

SHAPE = Shape("a table of costs per sample that only a second term of the loss uses")


def train_loader():
    return batches(lambda seed: [images(seed=seed), labels(), torch.rand(8, 3)])


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def training_step(self, batch, batch_idx):
        x, y, costs = batch
        logits = self.net(x)
        return F.cross_entropy(logits, y) + 0.1 * (logits.softmax(1) * costs).sum(1).mean()

    def validation_step(self, batch, batch_idx):
        x, y, _costs = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
