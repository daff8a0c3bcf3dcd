"""How far other people's corruptions lead from the pictures of ``real_pictures``: mean PSNR in dB, severities 1 to 5.

Computed once, on whole numbers 0 to 255, after ``numpy.random.seed(0)``; the mean over the four pictures and over 1 to
100 draws each (1 where nothing is random, 3 for noise at 224). Packages: corrupt_tta 0.1.7, opencv-python-headless
5.0.0.93, scikit-image 0.26.0, scipy 1.17.1, numpy 2.4.6, pillow 13.0.0.
"""

from __future__ import annotations

__all__ = ["AS_PUBLISHED", "CORRUPT_TTA"]

Table = dict[str, tuple[float, float, float, float, float]]

CORRUPT_TTA: dict[int, Table] = {
    224: {
        "gaussian_noise": (22.6, 19.33, 16.18, 13.45, 10.84),
        "shot_noise": (22.44, 18.93, 16.04, 12.68, 10.81),
        "impulse_noise": (19.62, 16.62, 14.84, 12.09, 10.08),
        "speckle_noise": (23.4, 21.1, 16.67, 14.79, 12.91),
        "gaussian_blur": (27.11, 23.93, 22.5, 21.62, 20.5),
        "defocus_blur": (24.26, 23.23, 21.84, 21.04, 20.42),
        "motion_blur": (21.56, 20.45, 20.49, 20.52, 19.75),
        "zoom_blur": (20.8, 19.69, 19.2, 18.5, 17.97),
        "glass_blur": (23.59, 23.51, 21.89, 21.59, 20.95),
        "snow": (15.92, 11.93, 11.68, 9.9, 8.81),
        "fog": (13.04, 12.23, 11.69, 11.65, 11.17),
        "brightness": (22.61, 17.16, 14.07, 11.87, 10.18),
        "contrast": (15.2, 13.86, 12.7, 11.68, 11.21),
        "saturate": (19.33, 17.15, 20.2, 14.84, 13.12),
        "pixelate": (27.19, 26.37, 24.97, 23.66, 23.22),
        "elastic": (14.35, 12.24, 19.29, 18.9, 18.49),
        "jpeg": (26.92, 26.13, 25.66, 24.55, 23.54),
    },
    32: {
        "gaussian_noise": (22.56, 19.26, 16.09, 13.37, 10.78),
        "shot_noise": (22.37, 18.86, 15.97, 12.65, 10.76),
        "impulse_noise": (19.82, 16.82, 14.96, 12.22, 10.17),
        "speckle_noise": (23.55, 21.22, 16.67, 14.93, 13.04),
        "gaussian_blur": (25.15, 21.16, 19.19, 17.93, 16.31),
        "defocus_blur": (21.59, 20.24, 18.25, 17.04, 16.05),
        "motion_blur": (17.0, 15.42, 15.42, 15.43, 14.39),
        "zoom_blur": (23.66, 22.27, 21.54, 20.72, 19.81),
        "glass_blur": (20.68, 20.67, 18.57, 18.29, 17.41),
        "snow": (15.88, 11.83, 11.51, 10.07, 8.67),
        "fog": (13.47, 12.53, 12.03, 11.86, 11.45),
        "brightness": (22.43, 16.9, 13.79, 11.58, 9.89),
        "contrast": (15.61, 14.27, 13.11, 12.09, 11.62),
        "saturate": (20.08, 17.89, 20.36, 15.13, 13.4),
        "pixelate": (25.17, 23.76, 21.67, 20.36, 19.77),
        "elastic": (9.05, 8.41, 14.95, 14.67, 14.04),
        "jpeg": (24.36, 23.64, 23.21, 22.1, 21.05),
    },
}
"""Side of the pictures -> ``corrupt_tta.corrupt(picture, severity, name)`` as it is, with ImageNet-C's parameters."""

AS_PUBLISHED: dict[str, Table] = {
    "imagenet": {
        "gaussian_noise": (22.6, 19.33, 16.18, 13.45, 10.84),
        "shot_noise": (22.44, 18.93, 16.04, 12.68, 10.81),
        "impulse_noise": (19.6, 16.59, 14.84, 12.08, 10.09),
        "speckle_noise": (23.4, 21.1, 16.67, 14.79, 12.91),
        "gaussian_blur": (27.11, 23.93, 22.5, 21.62, 20.5),
        "defocus_blur": (24.26, 23.23, 21.84, 21.04, 20.42),
        "motion_blur": (23.48, 21.6, 20.0, 18.74, 18.02),
        "zoom_blur": (20.8, 19.69, 19.2, 18.5, 17.97),
        "glass_blur": (23.59, 23.5, 21.85, 21.57, 20.94),
        "snow": (15.62, 11.65, 11.45, 9.78, 8.71),
        "fog": (13.08, 12.15, 11.6, 11.61, 11.16),
        "brightness": (22.61, 17.16, 14.07, 11.87, 10.18),
        "contrast": (15.2, 13.86, 12.7, 11.68, 11.21),
        "saturate": (19.33, 17.15, 20.2, 14.84, 13.12),
        "pixelate": (27.19, 26.37, 24.97, 23.66, 23.22),
        "elastic": (14.38, 12.18, 19.2, 19.03, 18.53),
        "jpeg": (26.92, 26.13, 25.66, 24.55, 23.54),
    },
    "small": {
        "gaussian_noise": (28.32, 24.9, 22.52, 21.55, 20.7),
        "shot_noise": (31.2, 28.28, 24.49, 23.32, 21.66),
        "impulse_noise": (24.6, 21.59, 19.78, 17.52, 16.06),
        "speckle_noise": (30.96, 26.76, 25.28, 22.97, 21.21),
        "gaussian_blur": (41.6, 30.01, 28.08, 26.83, 25.15),
        "defocus_blur": (41.4, 33.42, 29.95, 27.23, 25.03),
        "motion_blur": (27.3, 24.05, 21.96, 21.96, 20.5),
        "zoom_blur": (25.05, 23.66, 22.27, 21.06, 20.11),
        "glass_blur": (18.81, 18.87, 20.03, 16.98, 18.11),
        "snow": (25.67, 19.74, 18.78, 16.23, 13.69),
        "fog": (24.39, 18.47, 16.27, 14.87, 13.36),
        "brightness": (28.22, 22.43, 19.17, 16.9, 13.79),
        "contrast": (23.22, 17.19, 15.61, 14.27, 12.59),
        "saturate": (20.08, 17.89, 24.7, 18.57, 16.53),
        "pixelate": (30.74, 31.11, 28.56, 26.62, 24.77),
        "elastic": (17.69, 18.28, 19.28, 19.92, 21.31),
        "jpeg": (28.31, 26.76, 26.35, 25.94, 25.42),
    },
}
"""Table -> corrupt_tta's functions with the parameters of that table put in place of its own (``imagenet`` at 224
pixels, ``small`` at 32), and with ``_motion_blur`` of imagecorruptions 1.1.2 in place of its straight line: that is the
half Gaussian of ImageMagick, which the published motion blur and snow are made with.
"""
