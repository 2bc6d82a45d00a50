"""Tokens, labels and images in a deterministic order."""

from mirai_ds.data.loader import Batch, BatchLoader
from mirai_ds.data.order import DataOrder
from mirai_ds.data.sources import Dataset, TokenSource, load_dataset

__all__ = ["Batch", "BatchLoader", "DataOrder", "Dataset", "TokenSource", "load_dataset"]
