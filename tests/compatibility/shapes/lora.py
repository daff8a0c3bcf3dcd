"""Low-rank adapters on frozen layers."""

import pytorch_lightning as pl
import torch
from compatibility.common import Shape, pairs
from torch import nn
from torch.nn import functional as F

SHAPE = Shape("low-rank adapters on frozen layers")
train_loader = val_loader = pairs


class Adapter(nn.Module):
    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(0.1 * torch.randn(rank, layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x):
        return self.layer(x) + F.linear(F.linear(x, self.down), self.up)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), Adapter(nn.Linear(64, 8)), nn.ReLU(), Adapter(nn.Linear(8, 3)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)
