"""The entry in checkpoints: readable without this package, versioned, packed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import zoo
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import PGD, AdversarialTraining, RobustAccuracy, ThreatModel, read_entry
from lightning_robust.attach.checkpoint import pack_bits, rewrite, unpack_bits, write_entry


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


def test_what_comes_from_numpy_is_written_in_plain_types(tmp_path: Path) -> None:
    checkpoint: dict[str, Any] = {}
    measured = {
        np.str_("ece"): np.float64(0.5), 3: np.int64(2), "sure": np.bool_(True), "names": [np.str_("a"), ("b", None)],
        np.int64(7): np.arange(3), "words": np.array(["x"]), "mean": torch.ones(2),
    }  # fmt: skip
    write_entry(checkpoint, {"calibration": measured, "step": np.int64(4)}, "1.2")
    torch.save(checkpoint, tmp_path / "x.ckpt")
    found = read_entry(tmp_path / "x.ckpt")
    section = found["calibration"]
    assert torch.equal(section.pop(7), torch.arange(3))
    assert torch.equal(section.pop("mean"), torch.ones(2))
    assert section == {"ece": 0.5, 3: 2, "sure": True, "names": ["a", ("b", None)], "words": ["x"]}
    assert [type(value) for value in section.values()] == [float, int, bool, list, list]
    assert found["step"] == 4


def test_what_plain_torch_would_not_open_is_left_out_and_named(tmp_path: Path) -> None:
    checkpoint: dict[str, Any] = {}
    with pytest.warns(UserWarning, match=r"\['calibration'\]\['at'\]\[1\] is of type PosixPath.*left out"):
        write_entry(checkpoint, {"calibration": {"ece": 0.5, "at": [1, tmp_path]}}, "1.2")
    with pytest.warns(UserWarning, match=r"\['odd'\] is of type type"):
        write_entry(checkpoint, {"odd": Path}, "1.2")
    torch.save(checkpoint, tmp_path / "x.ckpt")
    found = read_entry(tmp_path / "x.ckpt")
    assert found["calibration"] == {"ece": 0.5, "at": [1]}
    assert "odd" not in found


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


def test_a_file_of_an_old_torch_is_read_too(tmp_path: Path) -> None:
    entry = {"format": 1, "global_step": 5}
    content = {"state_dict": {"weight": torch.arange(3.0)}, "lightning_robust": entry}
    torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert read_entry(tmp_path / "old.ckpt") == entry
    with pytest.raises(FileNotFoundError):
        read_entry(tmp_path / "missing.ckpt")


# -- files that are written again ------------------------------------------------------------------------------------


def a_file(folder: Path, **more: Any) -> Path:
    entry = {"format": 1, "global_step": 5, "calibration": {"nll": 1.0, "temperature": 2.0}}
    state = {"weight": torch.arange(3.0), "half": torch.ones(2, dtype=torch.bfloat16)}
    checkpoint = {"state_dict": state, "global_step": 5, "epoch": 1, "lightning_robust": entry, **more}
    torch.save(checkpoint, folder / "x.ckpt")
    return folder / "x.ckpt"


def test_a_rewritten_file_differs_in_its_entry_only(tmp_path: Path) -> None:
    path = a_file(tmp_path, callbacks={"one": {"best": torch.tensor(2.5)}}, hyper_parameters={"lr": 0.1})
    before = torch.load(path, weights_only=True)
    rewrite(path, {"calibration": {"temperature": 1.5}, "ood": {"n": 3}}, "1.2")
    after = torch.load(path, weights_only=True)
    assert after.pop("lightning_robust") == {
        "format": 1,
        "written_by": "lightning_robust 1.2",
        "global_step": 5,
        "epoch": 1,
        "calibration": {"nll": 1.0, "temperature": 1.5},
        "ood": {"n": 3},
    }
    before.pop("lightning_robust")
    weights = before.pop("state_dict"), after.pop("state_dict")
    assert all(
        torch.equal(weights[0][k], weights[1][k]) and weights[0][k].dtype == weights[1][k].dtype for k in weights[0]
    )
    assert after == before
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_a_file_without_an_entry_gets_one(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "global_step": 7, "epoch": 0}, tmp_path / "x.ckpt")
    rewrite(tmp_path / "x.ckpt", {"calibration": {"temperature": 1.5}}, "1.2")
    entry = read_entry(tmp_path / "x.ckpt")
    assert (entry["format"], entry["global_step"], entry["calibration"]) == (1, 7, {"temperature": 1.5})


def test_a_copy_may_be_written_elsewhere(tmp_path: Path) -> None:
    path = a_file(tmp_path)
    before, there = path.read_bytes(), tmp_path / "new" / "folder" / "y.ckpt"
    rewrite(path, {"calibration": {"temperature": 1.5}}, "1.2", to=there)
    assert path.read_bytes() == before
    assert read_entry(there)["calibration"]["temperature"] == 1.5
    assert os.listdir(there.parent) == ["y.ckpt"]


def test_what_interrupts_the_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = a_file(tmp_path)
    before = path.read_bytes()

    def full(_checkpoint: Any, file: Any) -> None:
        Path(file).write_bytes(b"half of i")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        rewrite(path, {"calibration": {"temperature": 1.5}}, "1.2")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_a_link_stays_a_link_to_the_rewritten_file(tmp_path: Path) -> None:
    path, link = a_file(tmp_path), tmp_path / "last.ckpt"
    link.symlink_to("x.ckpt")
    rewrite(link, {"calibration": {"temperature": 1.5}}, "1.2")
    assert link.is_symlink()
    assert read_entry(path)["calibration"]["temperature"] == 1.5


def test_objects_are_not_loaded_unasked(tmp_path: Path) -> None:
    path = a_file(tmp_path, hyper_parameters={"loss": torch.nn.CrossEntropyLoss()})
    before = path.read_bytes()
    with pytest.raises(pickle.UnpicklingError):
        rewrite(path, {"calibration": {"temperature": 1.5}}, "1.2")
    assert path.read_bytes() == before
    with pytest.raises(pickle.UnpicklingError):
        read_entry(path)
    assert read_entry(path, weights_only=False)["calibration"]["temperature"] == 2.0
