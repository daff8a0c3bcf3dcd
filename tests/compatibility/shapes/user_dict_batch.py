"""A UserDict, as tokenizers and image processors return."""

from collections import UserDict

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, batches, conv_net, images, labels
from torch.nn import functional as F

SHAPE = Shape("a UserDict, as tokenizers and image processors return", inputs=(("pixel_values",),))


def train_loader():
    return batches(lambda seed: UserDict(pixel_values=images(seed=seed), labels=labels()))


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch["pixel_values"]), batch["labels"])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch["pixel_values"]), batch["labels"]), batch_size=8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
