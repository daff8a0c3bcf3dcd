"""A dict of pictures and labels with names and an empty entry."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, batches, conv_net, images, labels
from torch.nn import functional as F

SHAPE = Shape("a dict of pictures and labels with names and an empty entry", inputs=(("image",),))


def train_loader():
    return batches(lambda seed: {"image": images(seed=seed), "label": labels(), "name": ["a"] * 8, "mask": None})


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["image"]), batch["label"])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch["image"]), batch["label"]), batch_size=8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
