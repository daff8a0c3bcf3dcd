"""A student under `kl_div` to a frozen teacher."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, conv_net, pairs
from torch.nn import functional as F

SHAPE = Shape(
    "a student under `kl_div` to a frozen teacher",
    monitors_warn=("have no energy",),
    noise=("in eval mode at the start",),
)
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = conv_net(), conv_net().eval().requires_grad_(False)

    def step(self, x):
        with torch.no_grad():
            target = self.teacher(x).softmax(1)
        return F.kl_div(F.log_softmax(self.student(x), 1), target, reduction="batchmean")

    def training_step(self, batch, batch_idx):
        return self.step(batch[0])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch[0]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=0.1)
