"""The pixels of a stored view, for an encoder that watches them: the same window that the codes were made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mirai_ds.config import UserError
from mirai_ds.data.crops import BadImageError, ViewGeometry, centre_crop
from mirai_ds.data.image_sets import NamedImages
from mirai_ds.data.stores import ImageStore

Array = np.ndarray[Any, Any]


class ViewSource(Protocol):
    """Pixels by (image, view)."""

    def gather(self, images: Array, views: Array) -> Array:
        """images (B,), views (B,) -> uint8 (B, 3, H, W).  Raises UserError."""
        ...


class ArrayViews:
    """Views held in memory: uint8 (n, views, 3, H, W)."""

    def __init__(self, pixels: Array) -> None:
        self.pixels = pixels

    def gather(self, images: Array, views: Array) -> Array:
        """See `ViewSource.gather`."""
        return np.ascontiguousarray(self.pixels[images, views])


class FileViews:
    """Views cut from the original files, decoded and resized anew each time."""

    def __init__(self, root: Path, names: list[str], geometry: ViewGeometry, upright: bool = False) -> None:
        """names, upright: as in `NamedImages`.  Raises UserError when `root` is another folder."""
        self.images, self.geometry = NamedImages(root, names, upright), geometry
        missing = self.images.missing()
        if missing is not None:
            raise UserError(f"data.images = {str(root)!r}: has no {missing}, which the token store was made of")

    def gather(self, images: Array, views: Array) -> Array:
        """See `ViewSource.gather`."""
        pixels = []
        for image, view in zip(images.tolist(), views.tolist(), strict=True):
            try:
                crop = centre_crop(self.images.load(image).image, self.geometry.side)
            except BadImageError as error:
                path = self.images.root / self.images.name(image)
                raise UserError(f"{path}: {error}; it could be read when its codes were made") from None
            pixels.append(self.geometry.view(crop, view))
        return _channels_first(pixels)


class PackedViews:
    """Views cut from the crops of an image store."""

    def __init__(self, store: ImageStore) -> None:
        self.store, self.geometry = store, store.manifest.geometry.views

    def gather(self, images: Array, views: Array) -> Array:
        """See `ViewSource.gather`."""
        pairs = zip(images.tolist(), views.tolist(), strict=True)
        return _channels_first([self.geometry.view(self.store.crop(image), view) for image, view in pairs])


def _channels_first(views: list[Array]) -> Array:
    return np.ascontiguousarray(np.stack(views).transpose(0, 3, 1, 2))
