"""The unembedding and the next-token loss in one operation, a few rows of logits at a time."""

from mirai_ds.kernels.linear_cross_entropy.op import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
