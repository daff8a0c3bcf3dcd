"""A yes/no answer as two logits, cross-entropy."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, batches, conv_net, images, labels
from torch.nn import functional as F

SHAPE = Shape("a yes/no answer as two logits, cross-entropy")


def train_loader():
    return batches(lambda seed: [images(seed=seed), labels(classes=2)])


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net(2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
