"""Stress for pictures: noise, blur, weather and digital damage, at five severities; ImageNet-C-like."""

from lightning_robust.corruptions.corrupt import CORRUPTIONS, GROUPS, SEVERITIES, Corruption, applicable, corrupt
from lightning_robust.corruptions.heat_map import shift_heat_map
from lightning_robust.corruptions.psnr import psnr
from lightning_robust.corruptions.tables import SMALL_SIDE, TABLES, Parameters, table_for

__all__ = [
    "CORRUPTIONS",
    "GROUPS",
    "SEVERITIES",
    "SMALL_SIDE",
    "TABLES",
    "Corruption",
    "Parameters",
    "applicable",
    "corrupt",
    "psnr",
    "shift_heat_map",
    "table_for",
]
