"""A list of crops whose logits are averaged."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, batches, conv_net, images, labels
from torch.nn import functional as F

SHAPE = Shape(
    "a list of crops whose logits are averaged",
    inputs=((0, 0), (0, 1)),
    arguments={"input_key": [(0, 0), (0, 1)]},
)


def train_loader():
    return batches(lambda seed: [[images(seed=seed), images(seed=seed + 3)], labels()])


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def step(self, batch):
        crops, y = batch
        return F.cross_entropy(torch.stack([self.net(crop) for crop in crops]).mean(0), y)

    def training_step(self, batch, batch_idx):
        return self.step(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
