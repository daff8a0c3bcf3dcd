"""One logit `(N, 1)`, BCE, float labels `(N, 1)`."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, batches, conv_net, images, labels
from torch import nn

SHAPE = Shape("one logit `(N, 1)`, BCE, float labels `(N, 1)`")


def train_loader():
    return batches(lambda seed: [images(seed=seed), labels(classes=2).float()[:, None]])


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.criterion = conv_net(1), nn.BCEWithLogitsLoss()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.criterion(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", self.criterion(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
