"""`nn.CrossEntropyLoss` with class weights and label smoothing as an attribute."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, conv_net, pairs
from torch import nn

SHAPE = Shape("`nn.CrossEntropyLoss` with class weights and label smoothing as an attribute")
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()
        self.criterion = nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0]), label_smoothing=0.1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.criterion(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", self.criterion(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
