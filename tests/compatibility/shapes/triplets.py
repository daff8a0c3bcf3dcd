"""Anchor, positive and negative under a triplet loss: no classes, no logits."""

import pytorch_lightning as pl
import torch
from compatibility.common import GROUPS, NO_LOSS, Shape, batches, features, images
from torch.nn import functional as F

SHAPE = Shape(
    "anchor, positive and negative under a triplet loss: no classes, no logits",
    errors=dict.fromkeys(GROUPS, NO_LOSS),
)


def train_loader():
    return batches(lambda seed: [images(seed=seed), images(seed=seed + 1), images(seed=seed + 2)])


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.embed = features()

    def training_step(self, batch, batch_idx):
        return F.triplet_margin_loss(*map(self.embed, batch))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.triplet_margin_loss(*map(self.embed, batch)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
