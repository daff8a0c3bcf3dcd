"""A validation step that computes accuracy and no loss."""

import pytorch_lightning as pl
import torch
import torchmetrics
from compatibility.common import Shape, conv_net, pairs
from torch.nn import functional as F

SHAPE = Shape("a validation step that computes accuracy and no loss")
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.accuracy = conv_net(), torchmetrics.Accuracy(task="multiclass", num_classes=3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.accuracy.update(self.net(x).argmax(1), y)
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
