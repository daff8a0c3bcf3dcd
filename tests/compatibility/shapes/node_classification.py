"""A graph as an object (x, edge_index, y, masks), a class for each node."""

import pytorch_lightning as pl
import torch
from compatibility.common import NO_BOX, NO_CORRUPTIONS, NO_PICTURES, Shape, batches, labels, rows
from torch import nn
from torch.nn import functional as F

SHAPE = Shape(
    "a graph as an object (x, edge_index, y, masks), a class for each node",
    inputs=(("x",),),
    pixels=NO_BOX,
    says={
        "ood": NO_PICTURES,
        "shift": NO_CORRUPTIONS,
        "saliency": r"does not take 4 samples in the place of .*refer to each other",
    },
)


class Graph:
    def __init__(self, seed):
        self.x, self.y = rows(seed=seed), labels()
        self.edge_index = torch.stack([torch.arange(8), (torch.arange(8) + 1) % 8])


def train_loader():
    return batches(Graph)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, graph):
        source, target = graph.edge_index
        x = graph.x.index_add(0, target, graph.x[source])
        return self.second(self.first(x).relu())

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch), batch.y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch), batch.y), batch_size=8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
