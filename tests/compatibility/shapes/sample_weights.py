"""Float sample weights that only the loss uses."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, batches, conv_net, images, labels
from torch.nn import functional as F

SHAPE = Shape("float sample weights that only the loss uses", inputs=(("x",),))


def train_loader():
    return batches(lambda seed: {"weight": torch.linspace(0.5, 2, 8), "x": images(seed=seed), "y": labels()})


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = conv_net()

    def step(self, batch):
        losses = F.cross_entropy(self.net(batch["x"]), batch["y"], reduction="none")
        return (losses * batch["weight"]).sum() / batch["weight"].sum()

    def training_step(self, batch, batch_idx):
        return self.step(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
