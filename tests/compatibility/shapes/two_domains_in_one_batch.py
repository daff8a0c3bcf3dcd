"""Source and target domain side by side in one forward with BatchNorm."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, conv_net, pairs
from pytorch_lightning.utilities import CombinedLoader
from torch.nn import functional as F

SHAPE = Shape(
    "source and target domain side by side in one forward with BatchNorm",
    inputs=(("source", 0),),
    in_training={"input_key": ("source", 0)},
)


def train_loader():
    return CombinedLoader({"source": pairs(), "target": pairs()}, "min_size")


val_loader = pairs


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def training_step(self, batch, batch_idx):
        (x, y), (other, _) = batch["source"], batch["target"]
        own, foreign = self.net(torch.cat([x, other])).chunk(2)
        confidence = foreign.softmax(1).square().sum(1).mean()
        return F.cross_entropy(own, y) - 0.1 * confidence

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
