"""Two views, cross-entropy on their similarity matrix (CLIP, SimCLR): a class is a partner in the batch."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, batches, features, images
from torch.nn import functional as F

SHAPE = Shape(
    "two views, cross-entropy on their similarity matrix (CLIP, SimCLR): a class is a partner in the batch",
    inputs=((0,), (1,)),
    arguments={"input_key": [0, 1]},
    says={"saliency": r"expected labels from 0 to 3.*a partner in the batch"},
)


def train_loader():
    return batches(lambda seed: [images(seed=seed), images(seed=seed + 4)])


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.embed = features()

    def step(self, batch):
        one, two = (F.normalize(self.embed(view), dim=1) for view in batch)
        return F.cross_entropy(one @ two.T / 0.2, torch.arange(len(one)))

    def training_step(self, batch, batch_idx):
        return self.step(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
