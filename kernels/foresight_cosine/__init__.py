"""Gather of 2D-neighbour targets and the per-head cosine loss."""

from mirai_ds.kernels.foresight_cosine.reference import foresight_cosine

__all__ = ["foresight_cosine"]
