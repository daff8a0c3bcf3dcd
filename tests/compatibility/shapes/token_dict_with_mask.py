"""A dict of input ids, attention mask and labels; the network returns an object with loss and logits."""

from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from compatibility.common import NO_CORRUPTIONS, NO_FLOATS, Shape, batches, labels
from torch import nn
from torch.nn import functional as F

SHAPE = Shape(
    "a dict of input ids, attention mask and labels; the network returns an object with loss and logits",
    errors=dict.fromkeys(("attacks", "robustness", "penalties"), NO_FLOATS),
    says={"shift": NO_CORRUPTIONS, "saliency": NO_FLOATS},
)


def tokens(seed):
    mask = (torch.arange(5) < torch.arange(8)[:, None] % 4 + 2).long()
    return {"input_ids": (torch.arange(40).view(8, 5) * (seed + 3)) % 20, "attention_mask": mask, "labels": labels()}


def train_loader():
    return batches(tokens)


def foreign():
    return [tokens(4)]


@dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask, labels):
        z = self.embedding(input_ids) * attention_mask[..., None]
        logits = self.head(z.sum(1) / attention_mask.sum(1, keepdim=True))
        return Output(F.cross_entropy(logits, labels), logits)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Net()

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


val_loader = train_loader
