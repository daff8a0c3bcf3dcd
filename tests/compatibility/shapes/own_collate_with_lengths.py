"""Padded sequences with their lengths, packed for a GRU."""

import pytorch_lightning as pl
import torch
from compatibility.common import NO_BOX, NO_CORRUPTIONS, NO_PICTURES, Shape, batches, labels, rows
from torch import nn
from torch.nn import functional as F

SHAPE = Shape(
    "padded sequences with their lengths, packed for a GRU",
    pixels=NO_BOX,
    says={"ood": NO_PICTURES, "shift": NO_CORRUPTIONS},
    inputs=(("signal",),),
)


def train_loader():
    lengths = torch.tensor([5, 5, 4, 4, 3, 3, 2, 2])
    return batches(lambda seed: {"signal": rows(seed=seed, width=20).view(8, 5, 4), "length": lengths, "y": labels()})


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 3)

    def step(self, batch):
        packed = nn.utils.rnn.pack_padded_sequence(batch["signal"], batch["length"], batch_first=True)
        _output, state = self.gru(packed)
        return F.cross_entropy(self.head(state[-1]), batch["y"])

    def training_step(self, batch, batch_idx):
        return self.step(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
