"""Gather of 2D-neighbour targets and the per-head cosine loss."""

from mirai_ds.kernels.foresight_cosine.op import KERNELS, choose, foresight_cosine

__all__ = ["KERNELS", "choose", "foresight_cosine"]
