"""Outputs appended to python lists, counters, a buffer that counts."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, conv_net, pairs
from torch.nn import functional as F

SHAPE = Shape("outputs appended to python lists, counters, a buffer that counts")
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.outputs, self.counts, self.calls = conv_net(), [], {"train": 0}, 0
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.calls += 1
        self.steps += 1
        self.counts["train"] += 1
        logits = self.net(x)
        self.outputs.append(logits.detach())
        return F.cross_entropy(logits, y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        self.outputs.append(logits)
        self.log("val_loss", F.cross_entropy(logits, y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
