"""Pictures that are no digits and ship inside packages: letters of fonts and patches of photos, no download."""

from __future__ import annotations

import importlib.util
import string
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

__all__ = ["Letters", "Patches"]

NO_CLASS = -1
MISSING = "pip install 'lightning-robust[demo]'"
PHOTOS = ("china.jpg", "flower.jpg")
DRAWN = 160  # pixels a letter is drawn at, before it is made small


class Letters(Dataset[tuple[Tensor, int]]):
    """The capital letters A to Z in the 12 DejaVu faces that ship with ``matplotlib``, 312 pictures.

    White on black and made like MNIST: the longer side of each letter fills 20 of 28 pixels, the centre of its mass
    lies in the middle. Items are ``(image, -1)``: float ``(1, size, size)`` in [0, 1], and no class.

    Args:
        size: Height and width of the pictures.

    Raises:
        ModuleNotFoundError: At first use, if ``matplotlib`` is missing; ``pip install 'lightning-robust[demo]'`` brings
            it.

    Example:
        >>> letters = Letters()
        >>> image, label = letters[0]
        >>> len(letters), image.shape, label
        (312, torch.Size([1, 28, 28]), -1)
    """

    def __init__(self, size: int = 28) -> None:
        self.size = size

    @cached_property
    def images(self) -> Tensor:
        """All pictures ``(N, 1, size, size)``, made when they are first asked for."""
        return torch.stack([_letter(letter, face, self.size) for face in _faces() for letter in string.ascii_uppercase])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], NO_CLASS


class Patches(Dataset[tuple[Tensor, int]]):
    """Grey patches, none overlapping, of the two photos that ship with ``scikit-learn``; 660 of 28 x 28 pixels.

    Items are ``(image, -1)``: float ``(1, size, size)`` in [0, 1], and no class.

    Args:
        size: Height and width of the patches.

    Raises:
        ModuleNotFoundError: At first use, if ``scikit-learn`` is missing; ``pip install 'lightning-robust[demo]'``
            brings it.

    Example:
        >>> len(Patches()), Patches(size=32)[0][0].shape
        (660, torch.Size([1, 32, 32]))
    """

    def __init__(self, size: int = 28) -> None:
        self.size = size

    @cached_property
    def images(self) -> Tensor:
        """All patches ``(N, 1, size, size)``, cut when they are first asked for."""
        try:
            from sklearn.datasets import load_sample_image
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"the demo patches need scikit-learn: {MISSING}") from error
        photos = (torch.tensor(load_sample_image(name), dtype=torch.float32) / 255 for name in PHOTOS)
        return torch.cat([_patches(photo, self.size) for photo in photos])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], NO_CLASS


def _faces() -> list[Path]:
    # Found without importing: matplotlib itself takes a second and has opinions about warnings.
    found = importlib.util.find_spec("matplotlib")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"the demo letters need the fonts of matplotlib: {MISSING}")
    folder = Path(found.submodule_search_locations[0], "mpl-data", "fonts", "ttf")
    return [face for face in sorted(folder.glob("DejaVu*.ttf")) if "Display" not in face.stem]


def _letter(letter: str, face: Path, size: int) -> Tensor:
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(face), DRAWN)
    canvas = Image.new("L", (2 * DRAWN, 2 * DRAWN))
    ImageDraw.Draw(canvas).text((DRAWN // 2, DRAWN // 2), letter, fill=255, font=font)
    # The box that a font states has margins; the one of the drawn pixels has none.
    drawn = canvas.crop(canvas.getbbox())
    scale = size * 20 / 28 / max(drawn.size)
    small = drawn.resize([max(1, round(side * scale)) for side in drawn.size], Image.Resampling.BOX)
    ink = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(small.height, small.width).float() / 255
    above, before = (_before(ink.sum(other), size) for other in (1, 0))
    padding = (before, size - small.width - before, above, size - small.height - above)
    return F.pad(ink, padding).unsqueeze(0)


def _before(mass: Tensor, size: int) -> int:
    """How many empty pixels come before ``mass``, for its centre to lie in the middle of ``size`` pixels."""
    centre = float((mass * (torch.arange(len(mass)) + 0.5)).sum() / mass.sum())
    return min(max(0, round(size / 2 - centre)), size - len(mass))


def _patches(photo: Tensor, size: int) -> Tensor:
    grey = photo @ torch.tensor([0.299, 0.587, 0.114])  # luma of ITU-R BT.601
    return grey.unfold(0, size, size).unfold(1, size, size).reshape(-1, 1, size, size)
