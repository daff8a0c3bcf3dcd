"""A frozen backbone under `torch.no_grad` (linear probe)."""

import pytorch_lightning as pl
import torch
from compatibility.common import NO_GRADIENT, Shape, features, pairs
from torch import nn
from torch.nn import functional as F

SHAPE = Shape(
    "a frozen backbone under `torch.no_grad` (linear probe)",
    errors=dict.fromkeys(("attacks", "robustness", "penalties"), NO_GRADIENT),
    says={"saliency": NO_GRADIENT},
)
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.head = features().requires_grad_(False), nn.Linear(8, 3)

    def step(self, batch):
        x, y = batch
        with torch.no_grad():
            z = self.body(x)
        return F.cross_entropy(self.head(z), y)

    def training_step(self, batch, batch_idx):
        return self.step(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.1)
