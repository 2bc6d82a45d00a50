"""LlamaGen's geometry to the pixel: ADM's centre crop of the shorter side, then ten crops, two or one.

Source: FoundationVision/LlamaGen (commit ce98ec4), its code extraction: ADM's centre crop to S = int(size * range),
torchvision's TenCrop.  Every view is a slice of the S x S crop, mirrored or not, so one stored crop serves all views.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

Array = np.ndarray[Any, Any]
Crops = Literal["ten", "flip", "one"]

# Resizing a sliver's shorter side to S makes its longer side enormous; what Pillow takes for a decompression bomb.
MAX_RESIZED_PIXELS = 178_956_970


class BadImageError(Exception):
    """An image that cannot be used; the message is the reason."""


class Window(NamedTuple):
    """Where a view lies in the unflipped S x S crop, and whether it is mirrored left to right."""

    top: int
    left: int
    mirrored: bool


@dataclass(frozen=True)
class ViewGeometry:
    """Views of `image_size` pixels a side: `ten` (LlamaGen's ten-crop), `flip` (the crop and its mirror), `one`.

    crop_range: S = int(image_size * crop_range) for ten; the others are the centre crop itself.
    """

    image_size: int
    crops: Crops = "ten"
    crop_range: float = 1.1

    @property
    def side(self) -> int:
        """S, the side of the centre crop that the views are cut from."""
        return int(self.image_size * self.crop_range) if self.crops == "ten" else self.image_size

    @property
    def num_views(self) -> int:
        """Views of an image."""
        return {"ten": 10, "flip": 2, "one": 1}[self.crops]

    def windows(self) -> list[Window]:
        """The window of each view.

        View v + 5 of ten is not the mirror of view v: the flipped crop's top left is the crop's top right; and its
        centre, rounded half to even in the flipped crop, may lie one pixel beside the crop's own.
        """
        if self.crops != "ten":
            return [Window(0, 0, bool(v)) for v in range(self.num_views)]
        rest = self.side - self.image_size
        middle = round(rest / 2)
        corners = [(0, 0), (0, rest), (rest, 0), (rest, rest), (middle, middle)]
        plain = [Window(top, left, False) for top, left in corners]
        return plain + [Window(top, rest - left, True) for top, left in corners]

    def view(self, crop: Array, view: int) -> Array:
        """View `view` (0-based) of a crop (S, S, C): (image_size, image_size, C), a slice without copying."""
        top, left, mirrored = self.windows()[view]
        window = crop[top : top + self.image_size, left : left + self.image_size]
        return window[:, ::-1] if mirrored else window


def centre_crop(image: Image.Image, size: int) -> Array:
    """ADM's centre crop (guided-diffusion's center_crop_arr): uint8 (size, size, C) of an RGB or L image.

    Halved by box filter while the shorter side is at least twice `size`, then bicubic to `size`, then cut; each step
    rounds to uint8.  Raises BadImageError for a sliver whose resized form would not fit into memory.
    """
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_RESIZED_PIXELS:
        problem = f"{image.width}x{image.height} pixels is too narrow to be resized to {size} on the short side"
        raise BadImageError(problem)
    pixels = np.asarray(image.resize((width, height), resample=Image.Resampling.BICUBIC))
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]
