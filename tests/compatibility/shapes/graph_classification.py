"""Several graphs in one object, a class for each graph: rows of the input are nodes, not samples."""

import pytorch_lightning as pl
import torch
from compatibility.common import NO_BOX, NO_CORRUPTIONS, NO_PICTURES, ONE_CLASS, ONE_PREDICTION, Shape, batches, rows
from torch import nn
from torch.nn import functional as F

SHAPE = Shape(
    "several graphs in one object, a class for each graph: rows of the input are nodes, not samples",
    inputs=(("x",),),
    pixels=NO_BOX,
    says={"ood": ONE_PREDICTION, "shift": NO_CORRUPTIONS, "saliency": ONE_CLASS},
    noise=(NO_PICTURES,),
    errors={
        "robustness": r"the loss gets 2 rows for a batch of 8 samples",
        "penalties": r"expected targets of 8 samples, or as many rows for each",
    },
)


class Graphs:
    def __init__(self, seed):
        self.x, self.batch, self.y = rows(seed=seed), torch.arange(8) // 4, torch.tensor([0, 1])
        self.edge_index = torch.stack([torch.arange(8), torch.arange(8) ^ 1])


def train_loader():
    return batches(Graphs)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, graphs):
        source, target = graphs.edge_index
        x = self.first(graphs.x.index_add(0, target, graphs.x[source])).relu()
        return self.second(x.new_zeros(2, 8).index_add(0, graphs.batch, x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch), batch.y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch), batch.y), batch_size=2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
