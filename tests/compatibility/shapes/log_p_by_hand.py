"""`-log p[y]` written by hand, nothing said."""

import pytorch_lightning as pl
import torch
from compatibility.common import GROUPS, NO_LOSS, Shape, conv_net, pairs
from torch.nn import functional as F

SHAPE = Shape(
    "`-log p[y]` written by hand, nothing said",
    errors=dict.fromkeys(GROUPS, NO_LOSS + r".*logits_fn="),
)
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def loss(self, batch):
        x, y = batch
        return -F.log_softmax(self.net(x), dim=1)[torch.arange(len(y)), y].mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
