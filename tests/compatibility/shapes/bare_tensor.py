"""A bare tensor, with labels that the step makes (which way a picture was turned)."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, batches, conv_net, images
from torch.nn import functional as F

SHAPE = Shape(
    "a bare tensor, with labels that the step makes (which way a picture was turned)", inputs=((),), samples=16
)


def train_loader():
    return batches(lambda seed: images(seed=seed))


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def step(self, x):
        turns = torch.arange(len(x), device=x.device) % 3
        turned = torch.stack([torch.rot90(image, int(k), (1, 2)) for image, k in zip(x, turns, strict=True)])
        return F.cross_entropy(self.net(turned), turns)

    def training_step(self, batch, batch_idx):
        return self.step(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
