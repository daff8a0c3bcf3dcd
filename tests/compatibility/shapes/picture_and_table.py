"""A picture and a row of a table, of which the picture is attacked."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, batches, features, images, labels, rows
from torch import nn
from torch.nn import functional as F

SHAPE = Shape(
    "a picture and a row of a table, of which the picture is attacked",
    inputs=(("image",),),
    arguments={"input_key": "image"},
)


def train_loader():
    return batches(lambda seed: {"table": rows(seed=seed), "image": images(seed=seed), "y": labels()})


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.head = features(), nn.Linear(14, 3)

    def training_step(self, batch, batch_idx):
        z = torch.cat([self.body(batch["image"]), batch["table"]], 1)
        return F.cross_entropy(self.head(z), batch["y"])

    def validation_step(self, batch, batch_idx):
        z = torch.cat([self.body(batch["image"]), batch["table"]], 1)
        self.log("val_loss", F.cross_entropy(self.head(z), batch["y"]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
