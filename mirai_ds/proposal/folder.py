"""What a folder of images holds, by a look at some of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mirai_ds.config import UserError
from mirai_ds.data.crops import BadImageError
from mirai_ds.data.image_sets import TAG, FolderImages, ImageSet, open_image_set

LOOKED_AT = 200  # images, evenly chosen: photographs take a tenth of a second each


class Look(NamedTuple):
    """One image: (width, height), whether it is grey, whether an orientation tag turns it; or why it is none."""

    size: tuple[int, int]
    grey: bool
    turned: bool
    problem: str | None = None


@dataclass(frozen=True)
class FolderFacts:
    """count: images by their names.  per_class: of each of `classes`.  looked_at: how many of them were read, of which
    `unreadable` are no images and `turned` have an orientation tag.  sizes: (width, height) of the others, by their
    short side.  grey: whether all of those are."""

    path: Path
    count: int
    classes: list[str]
    per_class: list[int]
    looked_at: int
    unreadable: int
    turned: int
    sizes: list[tuple[int, int]]
    grey: bool

    @property
    def short_side(self) -> int:
        """The median of the short sides, in pixels."""
        return min(self.sizes[len(self.sizes) // 2])

    def sentence(self) -> str:
        """What was found, for people."""
        low, high = self.sizes[0], self.sizes[-1]
        sizes = f"{low[0]}x{low[1]}" + (f" to {high[0]}x{high[1]}" if high != low else "")
        least, most = min(self.per_class), max(self.per_class)
        each = f"{least}" if least == most else f"{least} to {most}"
        classes = f"{len(self.classes)} classes of {each}" if len(self.classes) > 1 else "one class"
        bad = f"; {self.unreadable} of {self.looked_at} looked at cannot be read" if self.unreadable else ""
        return f"{self.count} in {classes}, {sizes} pixels, {'grey' if self.grey else 'colour'}{bad}"


def look(path: Path) -> tuple[FolderFacts, ImageSet]:
    """Read up to `LOOKED_AT` images of class folders, a flat folder or idx files; with the set, which is turned upright
    where one of them has an orientation tag.

    Raises UserError where `open_image_set` does, where none of them can be read, and for a single image.
    """
    images = open_image_set(path)
    count = len(images.names)
    chosen = np.unique(np.linspace(0, count - 1, min(LOOKED_AT, count)).round().astype(int)).tolist()
    with ThreadPoolExecutor() as pool:
        looks = [*pool.map(lambda index: _look(images, index), chosen)]
    good = [one for one in looks if one.problem is None]
    if not good:
        raise UserError(f"{path}: not one of {len(looks)} images can be read; {images.names[0]}: {looks[0].problem}")
    if count - (len(looks) - len(good)) < 2:
        raise UserError(f"{path}: holds one image that can be read; training needs two, and hundreds to learn from")
    turned = sum(one.turned for one in good)
    if isinstance(images, FolderImages):
        images.upright = turned > 0
    per_class = np.bincount(images.labels, minlength=len(images.classes)).tolist()
    sizes = sorted((one.size for one in good), key=lambda size: (min(size), size))
    grey = all(one.grey for one in good)
    facts = FolderFacts(
        path, count, images.classes, per_class, len(looks), len(looks) - len(good), turned, sizes, grey
    )  # fmt: skip
    return facts, images


def _look(images: ImageSet, index: int) -> Look:
    try:
        image, note = images.load(index)
    except BadImageError as error:
        return Look((0, 0), False, False, str(error))
    pixels: np.ndarray[Any, Any] = np.asarray(image)
    return Look(image.size, bool((pixels == pixels[..., :1]).all()), TAG in (note or ""))
