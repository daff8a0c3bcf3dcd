"""Scalars that are added to a loss."""

from lightning_robust.penalties.kl import kl_divergence

__all__ = ["kl_divergence"]
