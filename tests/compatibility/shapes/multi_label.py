"""Several labels a picture `(N, K)`, floats."""

import pytorch_lightning as pl
import torch
from compatibility.common import ONE_CLASS, ONE_PREDICTION, Shape, batches, conv_net, images
from torch.nn import functional as F

SHAPE = Shape("several labels a picture `(N, K)`, floats", says={"ood": ONE_PREDICTION, "saliency": ONE_CLASS})


def train_loader():
    return batches(lambda seed: [images(seed=seed), (torch.arange(32).view(8, 4) % 3 == 0).float()])


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net(4)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.binary_cross_entropy_with_logits(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.binary_cross_entropy_with_logits(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
