"""A network under `torch.compile`, backend aot_eager (no second derivative)."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, features, pairs
from torch.nn import functional as F

SHAPE = Shape(
    "a network under `torch.compile`, backend aot_eager (no second derivative)",
    noise=("The .grad attribute of a Tensor that is not a leaf",),
)
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.compile(features(3), backend="aot_eager")

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
