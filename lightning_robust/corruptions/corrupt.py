"""Corrupted pictures for a model: by name and severity, the same picture for the same index wherever it is made."""

from __future__ import annotations

import difflib
import operator
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor

from lightning_robust.corruptions.blur import defocus_blur, gaussian_blur, glass_blur, motion_blur, zoom_blur
from lightning_robust.corruptions.digital import contrast, elastic, pixelate, saturate
from lightning_robust.corruptions.jpeg import jpeg
from lightning_robust.corruptions.noise import gaussian_noise, impulse_noise, shot_noise, speckle_noise
from lightning_robust.corruptions.tables import TABLES, Parameters, table_for
from lightning_robust.corruptions.weather import brightness, fog, snow
from lightning_robust.pixels import PixelSpace
from lightning_robust.randomness import seeded

__all__ = ["CORRUPTIONS", "GROUPS", "SEVERITIES", "Corruption", "applicable", "corrupt"]

Corruption = Callable[[Tensor, Parameters, Sequence[Generator]], Tensor]
"""``(pictures (N, C, H, W) in [0, 1], parameters of one severity, one generator a picture) -> pictures``."""

SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST_SIDE = 4
_PLAIN = PixelSpace()

GROUPS: Mapping[str, Mapping[str, Corruption]] = {
    "noise": {
        "gaussian_noise": gaussian_noise,
        "shot_noise": shot_noise,
        "impulse_noise": impulse_noise,
        "speckle_noise": speckle_noise,
    },
    "blur": {
        "gaussian_blur": gaussian_blur,
        "defocus_blur": defocus_blur,
        "motion_blur": motion_blur,
        "zoom_blur": zoom_blur,
        "glass_blur": glass_blur,
    },
    "weather": {"snow": snow, "fog": fog, "brightness": brightness},
    "digital": {
        "contrast": contrast,
        "saturate": saturate,
        "pixelate": pixelate,
        "elastic": elastic,
        "jpeg": jpeg,
    },
}
"""The corruptions by what does such things to pictures."""

CORRUPTIONS: Mapping[str, Corruption] = {name: made for group in GROUPS.values() for name, made in group.items()}
"""The corruptions by name."""


def applicable(name: str, channels: int) -> bool:
    """Whether a corruption means anything for pictures with so many channels: ``saturate`` needs three.

    Raises:
        ValueError: If there is no such corruption; the message names the nearest one.

    Example:
        >>> applicable("saturate", 3), applicable("saturate", 1), applicable("fog", 1)
        (True, False, True)
    """
    _named(name)
    return name != "saturate" or channels == 3


def corrupt(
    x: Tensor,
    name: str,
    severity: int,
    *,
    index: Tensor | Sequence[int],
    seed: int = 0,
    pixels: PixelSpace = _PLAIN,
    table: str | None = None,
) -> Tensor:
    """Pictures as they come out of a bad camera, bad weather or a bad codec; ImageNet-C-like.

    Settings are those of ImageNet-C and CIFAR-10-C, the code is not: numbers measured with these pictures are not
    comparable with published ones. For that, evaluate on the published data sets.

    What is drawn at random is a function of (seed, corruption, severity, index) alone: the same picture comes out in
    every epoch, in any batch and on any rank, to the last bit where device, number of threads and the precision of
    matrix products (``torch.set_float32_matmul_precision``) are the same. All of it is computed in float32, whatever
    the type of the pictures. Gradients are not kept.

    Args:
        x: Pictures ``(N, C, H, W)`` in model units, floating point, each side at least 4.
        name: One of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        index: For each picture its number in the data set, ``(N,)``.
        seed: Another seed, other pictures.
        pixels: The pixel space, with bounds. Where it lets values lie outside (``outside="widen"``) those are moved
            to the bounds first.
        table: Name of a table of :data:`TABLES`; by default ``small`` for pictures with a shorter side of at most 64
            pixels, ``imagenet`` for others.

    Returns:
        Pictures in model units, of the same shape, type and device.

    Raises:
        ValueError: If there is no such corruption, severity or table; if ``x`` holds no pictures, leaves the bounds or
            is not finite; if the pixel space has no bounds; if the corruption needs three channels and got another
            number; or if there is not one index for each picture.

    Example:
        >>> x = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
        >>> made = corrupt(x, "gaussian_noise", 3, index=[17])
        >>> made.shape, torch.equal(made, corrupt(x.expand(2, -1, -1, -1), "gaussian_noise", 3, index=[4, 17])[1:])
        (torch.Size([1, 1, 8, 8]), True)

    References:
        Hendrycks and Dietterich, `Benchmarking Neural Network Robustness to Common Corruptions and Perturbations
        <https://arxiv.org/abs/1903.12261>`_, 2019. Left out are frost, which is made of photographs, and spatter.
    """
    corruption = _named(name)
    if isinstance(severity, bool) or severity not in SEVERITIES:
        raise ValueError(f"expected a severity in 1, 2, 3, 4, 5; got {severity!r}.")
    if x.ndim != 4 or not x.is_floating_point() or min(x.shape[2:]) < SMALLEST_SIDE:
        raise ValueError(
            f"expected float pictures (N, C, H, W) with sides of at least {SMALLEST_SIDE}, got {x.dtype} "
            f"{tuple(x.shape)}; corruptions are made for pictures only, whole numbers are converted with "
            f"x.float() / 255."
        )
    numbers = _indices(index, x)
    if not applicable(name, x.shape[1]):
        raise ValueError(
            f"expected three channels for {name!r}, got {x.shape[1]}; leave it out where applicable({name!r}, "
            f"{x.shape[1]}) is False."
        )
    if pixels.bounds is None:
        raise ValueError(
            "expected a pixel space with bounds, got PixelSpace(bounds=None); corruptions are measured in shares of "
            "the pixel range: give the lowest and highest value that a picture can have, e.g. bounds=(0, 1)."
        )
    chosen = TABLES[_known("tables", table_for(*x.shape[2:]) if table is None else table, TABLES)]
    if not len(x):
        return x.clone()
    number = zlib.crc32(name.encode())  # of the name: it stays what it is when corruptions are added
    generators = [seeded(seed, number, int(severity), i) for i in numbers]
    low, high = pixels.bounds
    # Matrix products under autocast would be taken in half precision.
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        (pixels if pixels.outside == "raise" else replace(pixels, bounds=None)).check(x, attacked=False)
        # In float32, because generators draw other numbers for doubles.
        image = ((pixels.to_pixels(x) - low) / (high - low)).clamp(0, 1).float().contiguous()
        made = corruption(image, chosen[name][int(severity) - 1], generators)
        return pixels.to_model(low + (high - low) * made, x.dtype)


def _named(name: str) -> Corruption:
    return CORRUPTIONS[_known("corruptions", name, CORRUPTIONS)]


def _known(kind: str, name: str, names: Mapping[str, object]) -> str:
    if name not in names:
        near = difflib.get_close_matches(str(name), names, 1, cutoff=0.3)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"expected {kind} out of {', '.join(names)}; got {name!r}.{hint}")
    return name


def _indices(index: Tensor | Sequence[int], x: Tensor) -> list[int]:
    numbers = [operator.index(i) for i in (index.flatten().tolist() if isinstance(index, Tensor) else index)]
    if len(numbers) != len(x):
        raise ValueError(f"expected one index per picture, got {len(numbers)} for {len(x)}.")
    return numbers
