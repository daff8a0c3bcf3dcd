"""`save_hyperparameters` and everything built from `self.hparams`."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, features, pairs
from torch.nn import functional as F

SHAPE = Shape("`save_hyperparameters` and everything built from `self.hparams`")
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self, width=4, lr=0.1, task="classify"):
        super().__init__()
        self.save_hyperparameters()
        self.net = features(3)
        self.width = self.hparams.width

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
