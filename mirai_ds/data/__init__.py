"""Tokens, labels and images in a deterministic order."""

from mirai_ds.data.loader import Batch, BatchLoader
from mirai_ds.data.order import DataOrder
from mirai_ds.data.sources import check_files, load_dataset, load_decoder
from mirai_ds.data.token_source import Dataset, TokenSource

__all__ = ["Batch", "BatchLoader", "DataOrder", "Dataset", "TokenSource", "check_files", "load_dataset", "load_decoder"]
