"""Data that ships in packages and small nets: what recipes and tests train on."""

from lightning_robust.demo.digits import Digits
from lightning_robust.demo.nets import Classifier, SmallCNN

__all__ = ["Classifier", "Digits", "SmallCNN"]
