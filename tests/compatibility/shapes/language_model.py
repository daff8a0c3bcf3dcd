"""A language model: logits and next tokens flattened before the loss."""

import pytorch_lightning as pl
import torch
from compatibility.common import NO_CORRUPTIONS, NO_FLOATS, ONE_CLASS, ONE_PREDICTION, Shape, batches
from torch import nn
from torch.nn import functional as F

SHAPE = Shape(
    "a language model: logits and next tokens flattened before the loss",
    inputs=(),
    errors=dict.fromkeys(("attacks", "robustness", "penalties"), NO_FLOATS),
    says={"ood": ONE_PREDICTION, "shift": NO_CORRUPTIONS, "saliency": ONE_CLASS},
    noise=("SaliencySnapshots_val measures nothing",),
)


def train_loader():
    return batches(lambda seed: (torch.arange(48).view(8, 6) * (seed + 3)) % 20)


def foreign():
    return [torch.arange(48).view(8, 6) % 7]


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def step(self, batch):
        logits = self.head(self.embedding(batch[:, :-1]))
        return F.cross_entropy(logits.reshape(-1, 20), batch[:, 1:].reshape(-1))

    def training_step(self, batch, batch_idx):
        return self.step(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
