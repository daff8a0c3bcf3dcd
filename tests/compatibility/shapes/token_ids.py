"""Token ids and an embedding."""

import pytorch_lightning as pl
import torch
from compatibility.common import NO_CORRUPTIONS, NO_FLOATS, Shape, batches, labels
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

SHAPE = Shape(
    "token ids and an embedding",
    errors=dict.fromkeys(("attacks", "robustness", "penalties"), NO_FLOATS),
    says={"shift": NO_CORRUPTIONS, "saliency": NO_FLOATS},
)


def train_loader():
    return batches(lambda seed: [(torch.arange(40).view(8, 5) * (seed + 3)) % 20, labels()])


def foreign():
    return TensorDataset(torch.arange(40).view(8, 5) % 7, labels())


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(40, 3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
