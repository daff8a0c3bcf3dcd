"""Boxes that a second head is trained on, behind the loss of the class."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, batches, features, images, labels
from torch import nn
from torch.nn import functional as F

SHAPE = Shape("boxes that a second head is trained on, behind the loss of the class", inputs=(("image",),))


def train_loader():
    return batches(lambda seed: {"boxes": torch.rand(8, 4), "image": images(seed=seed), "label": labels()})


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.kind, self.box = features(), nn.Linear(8, 3), nn.Linear(8, 4)

    def step(self, batch):
        z = self.body(batch["image"])
        return F.cross_entropy(self.kind(z), batch["label"]) + F.smooth_l1_loss(self.box(z), batch["boxes"])

    def training_step(self, batch, batch_idx):
        return self.step(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
