"""A list with file names and None beside the tensors."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, batches, conv_net, images, labels
from torch.nn import functional as F

SHAPE = Shape("a list with file names and None beside the tensors", inputs=((1,),))


def train_loader():
    return batches(lambda seed: [["a.png"] * 8, images(seed=seed), None, labels()])


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def training_step(self, batch, batch_idx):
        _names, x, _mask, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        _names, x, _mask, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y), batch_size=8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
