"""More metrics than a forked run of Lightning can carry home: ``python crowd.py FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytorch_lightning as pl
from torch.utils.data import DataLoader
from user_code import QUIET, Module, labelled

from lightning_robust import OODMonitor

SCORES = ["energy", "max_logit", "msp", "entropy", "gen", "margin"]


def main(folder: Path) -> None:
    crowd = [OODMonitor(max_samples=10, scores=SCORES, name=name) for name in ("one", "two", "three")]
    trainer = pl.Trainer(devices=2, strategy="ddp_fork", max_epochs=2, callbacks=crowd, **QUIET)
    trainer.fit(Module(), DataLoader(labelled(40), 20), DataLoader(labelled(40, 1), 20))
    keys = sorted(key for key in trainer.callback_metrics if key.startswith("ood"))
    (folder / "keys.json").write_text(json.dumps(keys))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
