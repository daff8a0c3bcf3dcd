"""Source and target domain from a CombinedLoader, each through the network by itself."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, features, pairs
from pytorch_lightning.utilities import CombinedLoader
from torch import nn
from torch.nn import functional as F

SHAPE = Shape(
    "source and target domain from a CombinedLoader, each through the network by itself", inputs=(("source", 0),)
)


def train_loader():
    return CombinedLoader({"source": pairs(), "target": pairs()}, "min_size")


val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.head = features(), nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        (x, y), (other, _) = batch["source"], batch["target"]
        z = self.body(x)
        loss = F.cross_entropy(self.head(z), y)
        return loss + (z.mean(0) - self.body(other).mean(0)).square().sum()

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.head(self.body(x)), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
