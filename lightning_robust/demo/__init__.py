"""Data that ships in packages and small nets: what recipes and tests train on."""

from lightning_robust.demo.cifar import CIFAR10, PreActClassifier, PreActResNet18
from lightning_robust.demo.decoy import DecoyDigits
from lightning_robust.demo.digits import Digits
from lightning_robust.demo.nets import MLP, Classifier, PlainCNN, SmallCNN
from lightning_robust.demo.ood import Letters, Patches
from lightning_robust.demo.training_digits import TrainingDigits
from lightning_robust.demo.uci import UCIDigits

__all__ = [
    "CIFAR10",
    "MLP",
    "Classifier",
    "DecoyDigits",
    "Digits",
    "Letters",
    "Patches",
    "PlainCNN",
    "PreActClassifier",
    "PreActResNet18",
    "SmallCNN",
    "TrainingDigits",
    "UCIDigits",
]
