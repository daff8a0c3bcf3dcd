"""How strong each corruption is at severities 1 to 5: one table for large pictures, one for small ones."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["SMALL_SIDE", "TABLES", "Parameters", "table_for"]

Parameters = tuple[float, ...]
"""The numbers of one corruption at one severity; each corruption says what they mean."""

SMALL_SIDE = 64
"""Pictures with a shorter side of at most this many pixels take the table ``small``."""

_IMAGENET: dict[str, tuple[Parameters, ...]] = {
    "gaussian_noise": ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,)),
    "shot_noise": ((60,), (25,), (12,), (5,), (3,)),
    "impulse_noise": ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,)),
    "speckle_noise": ((0.15,), (0.2,), (0.35,), (0.45,), (0.6,)),
    "gaussian_blur": ((1,), (2,), (3,), (4,), (6,)),
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": ((12, 0.01), (16, 0.01), (11, 0.02), (13, 0.02), (11, 0.03)),
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "snow": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "brightness": ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,)),
    "contrast": ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,)),
    "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    "pixelate": ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,)),
    "elastic": ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    "jpeg": ((25,), (18,), (15,), (10,), (7,)),
}

_SMALL: dict[str, tuple[Parameters, ...]] = {
    "gaussian_noise": ((0.04,), (0.06,), (0.08,), (0.09,), (0.1,)),
    "shot_noise": ((500,), (250,), (100,), (75,), (50,)),
    "impulse_noise": ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,)),
    "speckle_noise": ((0.06,), (0.1,), (0.12,), (0.16,), (0.2,)),
    "gaussian_blur": ((0.4,), (0.6,), (0.7,), (0.8,), (1,)),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": ((7, 0.01), (12, 0.01), (16, 0.01), (21, 0.01), (26, 0.01)),
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": ((0.05,), (0.1,), (0.15,), (0.2,), (0.3,)),
    "contrast": ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,)),
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    "pixelate": ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,)),
    "elastic": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    "jpeg": ((80,), (65,), (58,), (50,), (40,)),
}

TABLES: Mapping[str, Mapping[str, tuple[Parameters, ...]]] = {"imagenet": _IMAGENET, "small": _SMALL}
"""Name of the table -> corruption -> parameters at severities 1 to 5.

``imagenet`` is meant for sides near 224, ``small`` for sides near 32, where the numbers of the other one would leave
nothing to see. Both are the published settings of ImageNet-C and CIFAR-10-C (Hendrycks and Dietterich, `Benchmarking
Neural Network Robustness to Common Corruptions and Perturbations <https://arxiv.org/abs/1903.12261>`_, 2019). Those of
``elastic`` are shares of the shorter side here; published are pixels of a side of 244 and 32.

Severity is a published setting, not a distance: in some rows a higher one leaves a picture closer to the original, with
the published code as with this. The first two of ``saturate`` take colour away, the others add some; the first two of
``elastic`` in ``imagenet`` slant the picture, the others ripple it, and in ``small`` slant falls while ripple grows;
``glass_blur`` in ``small`` trades blur for rounds; 3 and 4 of ``fog`` in ``imagenet`` are as much fog, of another
grain; 2 of ``pixelate`` in ``small`` happens to fit a side of 32 better than 1.
"""


def table_for(height: int, width: int) -> str:
    """Which table pictures of this size take.

    Example:
        >>> table_for(224, 224), table_for(28, 28)
        ('imagenet', 'small')
    """
    return "small" if min(height, width) <= SMALL_SIDE else "imagenet"
