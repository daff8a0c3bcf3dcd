"""Peak memory of one fit in a process of its own: ``python -m tests.benchmarks.memory METHOD``, bytes to stdout."""

from __future__ import annotations

import resource
import sys
import warnings
from pathlib import Path

import torch

from lightning_robust import PGD, AdversarialTraining, ThreatModel
from tests.benchmarks.subjects import EPS, Plain, Subject, trainer

THREAT = ThreatModel("linf", EPS)
METHODS = ("plain", "madry", "trades", "mart", "n-fgsm", "madry, awp")


def main() -> None:
    """Two steps; what the process held before them does not count."""
    method, _, awp = sys.argv[1].partition(", ")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    subject = Subject("cnn", 256, batches=2)
    module = Plain(subject.net())
    callbacks = []
    if method != "plain":
        attack = THREAT if method == "n-fgsm" else PGD(THREAT, steps=3)
        # The alarm's own batch at the end of an epoch is a part of it.
        callbacks = [AdversarialTraining(attack, method, awp=0.005 if awp else None)]
    fit = trainer(*callbacks, max_epochs=1)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    fit.fit(module, subject.loader)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


if __name__ == "__main__":
    main()
