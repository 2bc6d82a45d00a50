"""From image files to token and image stores: planned, resumable, on any number of processes."""

from mirai_ds.extract.run import Options, extract_codes, extract_images

__all__ = ["Options", "extract_codes", "extract_images"]
