"""What we leave in checkpoints, and how to read it without us.

``checkpoint["lightning_robust"]`` holds plain numbers, strings, lists, dicts and tensors only, so that
``torch.load(path, weights_only=True)["lightning_robust"]`` reads it on a machine that does not have this package.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.attach.patch import patch
from lightning_robust.attach.plain import plain

__all__ = [
    "FORMAT",
    "KEY",
    "pack_bits",
    "read_entry",
    "record_into_every_checkpoint",
    "rewrite",
    "unpack_bits",
    "write_entry",
]

KEY = "lightning_robust"
FORMAT = 1

Sections = Callable[[], Mapping[str, Any]]


def write_entry(checkpoint: dict[str, Any], sections: Mapping[str, Any], version: str) -> None:
    """Merge ``sections`` into the entry of a checkpoint that is being saved.

    Numbers, strings and arrays of numpy become plain ones and tensors, keys become strings where they are neither that
    nor whole numbers; what ``torch.load(weights_only=True)`` would not open is left out, with a warning that says where
    it was.
    """
    entry = checkpoint.setdefault(KEY, {"format": FORMAT})
    entry.update(
        written_by=f"lightning_robust {version}",
        global_step=int(checkpoint.get("global_step", 0)),
        epoch=int(checkpoint.get("epoch", 0)),
    )
    for name, content in plain(sections, f"checkpoint[{KEY!r}]", _left_out).items():
        entry[name] = {**entry.get(name, {}), **content} if isinstance(content, Mapping) else content


def _left_out(message: str) -> None:
    warnings.warn(f"{message} It is left out.", stacklevel=2)


def read_entry(source: str | Path | Mapping[str, Any], *, weights_only: bool = True) -> dict[str, Any]:
    """The entry of a checkpoint, from its path or from the loaded dict.

    Args:
        source: The checkpoint.
        weights_only: ``False`` for a file that holds objects of somebody's classes (a module that saved one among its
            hyper-parameters), if you trust whoever wrote it: loading runs code.

    Returns:
        ``format``, ``written_by``, ``global_step``, ``epoch`` and one section per kind of measurement.

    Raises:
        KeyError: If the checkpoint was written without this package.
        ValueError: If it was written by a later format than this version reads.

    Example:
        >>> read_entry({"lightning_robust": {"format": 1, "global_step": 20}})["global_step"]
        20
    """
    loaded: Any = source
    if isinstance(source, (str, Path)):
        mmap = zipfile.is_zipfile(source)  # not so in files of old versions of torch, which have to be read whole
        loaded = torch.load(source, map_location="cpu", weights_only=weights_only, mmap=mmap)
    if KEY not in loaded:
        raise KeyError(f"no {KEY!r} entry in this checkpoint; it was saved by a run without callbacks of this package.")
    entry: dict[str, Any] = loaded[KEY]
    if entry.get("format", 0) > FORMAT:
        raise ValueError(
            f"the checkpoint has entry format {entry['format']}, this version reads up to {FORMAT}: upgrade "
            f"lightning_robust."
        )
    return entry


def rewrite(
    path: str | Path,
    sections: Mapping[str, Any],
    version: str,
    to: str | Path | None = None,
    drop: Container[str] = (),
) -> None:
    """Merge ``sections`` into the entry of a checkpoint file, in place or written to another file; all or nothing.

    Args:
        path: The file.
        sections: By name.
        version: Of this package.
        to: The other file.
        drop: Which sections to take out first, with those of named callbacks (``"ood"`` for ``"ood.far"``).

    Raises:
        pickle.UnpicklingError: If the file holds objects of somebody's classes, which ``torch.load`` does not trust.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if KEY in checkpoint:
        kept = {name: part for name, part in checkpoint[KEY].items() if name.split(".")[0] not in drop}
        checkpoint[KEY] = kept
    write_entry(checkpoint, sections, version)
    target = Path(path if to is None else to).resolve()  # a link stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".part")
    try:
        torch.save(checkpoint, beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def record_into_every_checkpoint(module: nn.Module, sections: Sections, version: str) -> Callable[[], None]:
    """Write ``sections()`` into every checkpoint of ``module``, weights-only ones included; returns what undoes it.

    Lightning asks callbacks only when it saves full checkpoints; the module's own hook is always called.
    """

    def on_save_checkpoint(_self: Any, original: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        original(checkpoint)
        write_entry(checkpoint, sections(), version)

    return patch(module, "on_save_checkpoint", on_save_checkpoint)


def pack_bits(right: Tensor) -> Tensor:
    """Booleans ``(N,)`` to ``ceil(N / 8)`` bytes, first sample in the highest bit (``numpy.packbits``).

    Example:
        >>> pack_bits(torch.tensor([True, False, True]))
        tensor([160], dtype=torch.uint8)
    """
    padded = torch.zeros(-(-len(right) // 8) * 8, dtype=torch.uint8)
    padded[: len(right)] = right.to(torch.uint8).cpu()
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)
    return (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """The inverse of :func:`pack_bits` for ``n`` samples.

    Example:
        >>> unpack_bits(torch.tensor([160], dtype=torch.uint8), 3)
        tensor([ True, False,  True])
    """
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
    return ((packed.unsqueeze(1) >> shifts) & 1).bool().flatten()[:n]
