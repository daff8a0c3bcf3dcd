"""A U-Net with skip connections, binary masks `(N, 1, H, W)`, BCE and a Dice term."""

import pytorch_lightning as pl
import torch
from compatibility.common import ONE_CLASS, ONE_PREDICTION, Shape, batches, images
from torch import nn
from torch.nn import functional as F

SHAPE = Shape(
    "a U-Net with skip connections, binary masks `(N, 1, H, W)`, BCE and a Dice term",
    inputs=(("image",),),
    says={"ood": ONE_PREDICTION, "saliency": ONE_CLASS},
)


def train_loader():
    return batches(lambda seed: {"image": images(seed=seed), "mask": (images(seed=seed) > 0.5).float()})


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.middle = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.up, self.head = nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Conv2d(8, 1, 1)

    def forward(self, x):
        a = self.down(x).relu()
        b = self.middle(F.max_pool2d(a, 2)).relu()
        return self.head(torch.cat([a, self.up(b)], 1))


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = UNet()

    def step(self, batch):
        z, y = self.net(batch["image"]), batch["mask"]
        p = z.sigmoid()
        dice = 1 - 2 * (p * y).sum() / (p.sum() + y.sum() + 1)
        return F.binary_cross_entropy_with_logits(z, y) + dice

    def training_step(self, batch, batch_idx):
        return self.step(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
