"""The entry in checkpoints: readable without this package, versioned, packed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import PGD, AdversarialTraining, RobustAccuracy, ThreatModel, read_entry
from lightning_robust.attach.checkpoint import pack_bits, unpack_bits, write_entry


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 101])
def test_packed_bits_are_numpys_and_come_back(n: int) -> None:
    bits = torch.rand(n) < 0.5
    assert pack_bits(bits).tolist() == np.packbits(bits.numpy()).tolist()
    assert torch.equal(unpack_bits(pack_bits(bits), n), bits)


def test_sections_of_several_callbacks_are_merged() -> None:
    checkpoint: dict[str, Any] = {"global_step": 7, "epoch": 2}
    write_entry(checkpoint, {"route": {"training_step": 1}}, "1.2")
    write_entry(checkpoint, {"route": {"validation_step": 2}, "robust": {"n": 3}}, "1.2")
    entry = read_entry(checkpoint)
    assert entry == {
        "format": 1,
        "written_by": "lightning_robust 1.2",
        "global_step": 7,
        "epoch": 2,
        "route": {"training_step": 1, "validation_step": 2},
        "robust": {"n": 3},
    }


def test_checkpoints_without_an_entry_or_of_a_later_format_are_refused() -> None:
    with pytest.raises(KeyError, match="no 'lightning_robust' entry"):
        read_entry({"state_dict": {}})
    with pytest.raises(ValueError, match=r"format 2.*up to 1: upgrade"):
        read_entry({"lightning_robust": {"format": 2}})


@pytest.mark.parametrize("weights_only", [True, False])
def test_every_checkpoint_has_an_entry_that_plain_torch_reads(tmp_path: Any, weights_only: bool) -> None:
    threat = ThreatModel("linf", 0.1)
    loader = DataLoader(TensorDataset(zoo.images(32), zoo.labels(32)), 16)
    keep = pl.callbacks.ModelCheckpoint(
        tmp_path, every_n_train_steps=1, save_top_k=-1, save_weights_only=weights_only, save_last=True
    )
    callbacks = [keep, AdversarialTraining(PGD(threat, steps=1)), RobustAccuracy(PGD(threat, steps=1))]
    trainer = zoo.trainer(max_epochs=2, enable_checkpointing=True, callbacks=callbacks)
    module = zoo.built(zoo.ListBatch)
    trainer.fit(module, loader, loader)
    trainer.save_checkpoint(tmp_path / "after_fit.ckpt")  # a full one: the module is no longer patched
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 6
    for path in paths:
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["lightning_robust"]["global_step"] == checkpoint["global_step"]
        assert checkpoint["lightning_robust"]["route"]["training_step"]["input"] == [0]
    assert zoo.ListBatch.load_from_checkpoint(paths[0]).state_dict().keys() == module.state_dict().keys()
