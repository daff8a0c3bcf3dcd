"""One logit `(N,)`, BCE, long labels that the step casts."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, batches, conv_net, images, labels
from torch.nn import functional as F

SHAPE = Shape("one logit `(N,)`, BCE, long labels that the step casts")


def train_loader():
    return batches(lambda seed: [images(seed=seed), labels(classes=2)])


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net(1)

    def step(self, batch):
        x, y = batch
        return F.binary_cross_entropy_with_logits(self.net(x).squeeze(1), y.float())

    def training_step(self, batch, batch_idx):
        return self.step(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
