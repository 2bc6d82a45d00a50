"""The pixels of a stored view, for an encoder that watches them: the same window that the codes were made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mirai_ds.config import UserError
from mirai_ds.data.crops import ViewGeometry, centre_crop
from mirai_ds.data.image_sets import SPLITS, BadImageError, IdxImages, Loaded, read_image
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

    def __init__(self, root: Path, names: list[str], geometry: ViewGeometry) -> None:
        """names: of the images below `root`, or `train/000042` of idx files.  Raises UserError without them."""
        self.root, self.geometry = root, geometry
        self.names = np.array([name.encode() for name in names])  # one block: workers share it without copying
        self._idx = None
        if any(root.glob("*-images[-.]idx3-ubyte*")):
            split = names[0].split("/")[0]
            if split not in SPLITS:
                raise UserError(
                    f"data.images = {str(root)!r}: the store's images are called {names[0]!r}, not idx images"
                )
            self._idx = IdxImages(root, split)
        for place in {0, len(names) // 2, len(names) - 1}:
            if self._idx is None and not (root / names[place]).is_file():
                raise UserError(
                    f"data.images = {str(root)!r}: has no {names[place]}, which the token store was made of"
                )

    def load(self, image: int) -> Loaded:
        """Image number `image` as RGB.  Raises BadImageError."""
        name = self.names[image].decode()
        if self._idx is not None:
            return self._idx.load(int(name.split("/")[1]))
        return read_image(self.root / name)

    def gather(self, images: Array, views: Array) -> Array:
        """See `ViewSource.gather`."""
        found = []
        for image, view in zip(images.tolist(), views.tolist(), strict=True):
            try:
                crop = centre_crop(self.load(image).image, self.geometry.side)
            except (BadImageError, ValueError) as error:
                name = self.names[image].decode()
                raise UserError(f"{self.root / name}: {error}; it could be read when its codes were made") from None
            found.append(self.geometry.view(crop, view))
        return _channels_first(found)


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
