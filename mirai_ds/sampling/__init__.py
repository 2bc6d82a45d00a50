"""Many images from one model on all ranks, into one file that evaluators read."""

from mirai_ds.sampling.request import SamplingRequest
from mirai_ds.sampling.run import draw_archive

__all__ = ["SamplingRequest", "draw_archive"]
