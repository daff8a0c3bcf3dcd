"""A focal loss written by hand, nothing said."""

import pytorch_lightning as pl
import torch
from compatibility.common import GROUPS, NO_LOSS, Shape, conv_net, pairs

SHAPE = Shape(
    "a focal loss written by hand, nothing said",
    errors=dict.fromkeys(GROUPS, NO_LOSS + r".*logits_fn="),
)
train_loader = val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def loss(self, batch):
        x, y = batch
        p = self.net(x).softmax(1).gather(1, y[:, None]).clamp_min(1e-6)
        return -((1 - p) ** 2 * p.log()).mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
