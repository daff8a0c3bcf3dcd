"""A second validation loader without labels."""

import pytorch_lightning as pl
import torch
from compatibility.common import NO_LOSS, Shape, batches, conv_net, images, pairs
from torch.nn import functional as F

SHAPE = Shape(
    "a second validation loader without labels",
    monitors_warn=(r"loader 1 of val is left out, the others are measured: .*" + NO_LOSS,),
)
train_loader = pairs


def val_loader():
    return [pairs(), batches(lambda seed: images(seed=seed + 7))]


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if dataloader_idx == 1:
            self.log("confidence", self.net(batch).softmax(1).amax(1).mean())
        else:
            x, y = batch
            self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
