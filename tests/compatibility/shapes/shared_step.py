"""A shared `_step` that logs loss and accuracy for every stage."""

import pytorch_lightning as pl
import torch
import torchmetrics
from compatibility.common import Shape, conv_net, pairs
from torch.nn import functional as F

SHAPE = Shape("a shared `_step` that logs loss and accuracy for every stage")
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)

    def _step(self, batch, stage):
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log_dict({f"{stage}/loss": loss, f"{stage}/accuracy": self.accuracy})
        return loss

    def training_step(self, batch, batch_idx):
        return self._step(batch, "train")

    def validation_step(self, batch, batch_idx):
        return self._step(batch, "val")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
