"""Two pictures, one tower each."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, batches, features, images, labels
from torch import nn
from torch.nn import functional as F

SHAPE = Shape(
    "two pictures, one tower each",
    inputs=(("left",), ("right",)),
    arguments={"input_key": ["left", "right"]},
)


def train_loader():
    return batches(lambda seed: {"left": images(seed=seed), "right": images(seed=seed + 5), "y": labels()})


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = features(), features(), nn.Linear(16, 3)

    def forward(self, left, right):
        return self.head(torch.cat([self.left(left), self.right(right)], 1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["left"], batch["right"]), batch["y"])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch["left"], batch["right"]), batch["y"]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
