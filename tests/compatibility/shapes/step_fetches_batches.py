"""A training step that takes an iterator (`dataloader_iter`)."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, conv_net, pairs
from torch.nn import functional as F

SHAPE = Shape(
    "a training step that takes an iterator (`dataloader_iter`)",
    errors=dict.fromkeys(("attacks", "penalties"), r"takes an iterator instead of a batch"),
    noise=("dataloader_iter",),
)
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def training_step(self, dataloader_iter):
        (x, y), _batch_idx, _dataloader_idx = next(dataloader_iter)
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
