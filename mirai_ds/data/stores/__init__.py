"""Folders of codes and of images: memory-mapped, sealed by a manifest, checked when opened."""

from mirai_ds.data.stores.files import store_format
from mirai_ds.data.stores.images import IMAGE_FORMAT, ImageManifest, ImageStore, open_image_store
from mirai_ds.data.stores.tokens import TOKEN_FORMAT, TokenManifest, TokenStore, open_token_store

__all__ = [
    "IMAGE_FORMAT",
    "TOKEN_FORMAT",
    "ImageManifest",
    "ImageStore",
    "TokenManifest",
    "TokenStore",
    "open_image_store",
    "open_token_store",
    "store_format",
]
