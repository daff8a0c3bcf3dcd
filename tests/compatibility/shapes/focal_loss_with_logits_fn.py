"""A focal loss written by hand, with `logits_fn=`."""

from compatibility.common import Shape
from compatibility.shapes.focal_loss_by_hand import Module, train_loader, val_loader

__all__ = ["SHAPE", "Module", "train_loader", "val_loader"]

SHAPE = Shape(
    "a focal loss written by hand, with `logits_fn=`",
    arguments={"logits_fn": lambda module, batch: module.net(batch[0]), "target_key": 1},
)
