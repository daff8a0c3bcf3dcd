"""A detector whose network returns a dict of losses on boxes."""

import pytorch_lightning as pl
import torch
from compatibility.common import GROUPS, NO_LOSS, Shape, batches, features, images
from torch import nn
from torch.nn import functional as F

SHAPE = Shape(
    "a detector whose network returns a dict of losses on boxes",
    errors=dict.fromkeys(GROUPS, NO_LOSS),
)


def train_loader():
    return batches(lambda seed: (list(images(seed=seed)), [{"boxes": torch.rand(2, 4)} for _ in range(8)]))


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = features(8)

    def forward(self, pictures, targets):
        boxes = self.body(torch.stack(pictures)).view(-1, 2, 4)
        truth = torch.stack([target["boxes"] for target in targets])
        return {"box": F.l1_loss(boxes, truth), "size": (boxes - truth).square().mean()}


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Detector()

    def training_step(self, batch, batch_idx):
        return sum(self.model(*batch).values())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", sum(self.model(*batch).values()), batch_size=8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
