"""A class for each pixel `(N, K, H, W)` with `ignore_index`."""

import pytorch_lightning as pl
import torch
from compatibility.common import ONE_CLASS, ONE_PREDICTION, Shape, batches, images
from torch import nn
from torch.nn import functional as F

SHAPE = Shape(
    "a class for each pixel `(N, K, H, W)` with `ignore_index`",
    says={"ood": ONE_PREDICTION, "saliency": ONE_CLASS},
)


def train_loader():
    def batch(seed):
        x = images(seed=seed)
        y = (x[:, 0] * 2.99).long()
        y[:, 0] = 255
        return [x, y]

    return batches(batch)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y, ignore_index=255)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y, ignore_index=255))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
