"""Real images to compare with: a folder, idx files, an image store, or a token store as its tokens show them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mirai_ds.config import UserError
from mirai_ds.data.image_sets import IdxImages, has_idx_files
from mirai_ds.data.stores import IMAGE_FORMAT, TOKEN_FORMAT, open_image_store, open_token_store, store_format
from mirai_ds.eval.image_sources import AS_THEY_ARE, FIT, FolderSource, ImageSource, fitted

Array = np.ndarray[Any, Any]
AS_TOKENS = "middle views as their tokens show them, "
CENTRE = {"ten": 4, "flip": 0, "one": 0}  # the view of a store that is the middle of its image


class MadeSource:
    """Images that a function makes, one by one, brought to `side` pixels a side."""

    def __init__(self, path: Path, count: int, own: int, side: int | None, load: Callable[[int], Array], digest: str,
                 what: str = "") -> None:  # fmt: skip
        """own: pixels a side that `load(index)`, uint8 (own, own, 3), has; side: None for the same.  digest: of all
        that decides the images but their size.  what: they are, for the protocol."""
        self.path, self.count, self._load = path, count, load
        self.height = self.width = side or own
        self.fit = what + (AS_THEY_ARE if self.height == own else FIT)
        self._digest = hashlib.sha256(f"{digest} {self.fit} {self.height}".encode()).hexdigest()

    def batches(self, size: int) -> Iterator[Array]:
        """See `ImageSource.batches`."""

        def one(index: int) -> Array:
            return np.asarray(fitted(Image.fromarray(self._load(index)), self.height))

        with ThreadPoolExecutor() as pool:
            for start in range(0, self.count, size):
                yield np.stack([*pool.map(one, range(start, min(start + size, self.count)))])

    def digest(self) -> str:
        """See `ImageSource.digest`."""
        return self._digest


def open_real_images(path: Path, side: int | None = None) -> ImageSource:
    """The images at `path`, a folder, brought to `side` pixels a side by `FIT`; None: as they are, of one size.

    A token store's are the middle views as its codebook shows them, so that a distance is the model's and not the
    tokenizer's; an image store's are its crops.  Raises UserError.
    """
    form = store_format(path)
    if form == TOKEN_FORMAT:
        return _of_tokens(path, side)
    if form == IMAGE_FORMAT:
        images = open_image_store(path)
        facts = images.manifest
        digest = f"{facts.shard_digests} {facts.index_digest}"
        # Of ten crops the store holds what they are cut from, a little more than the size that it is of.
        whole = facts.geometry.views.side
        return MadeSource(path, facts.num_images, whole, side or facts.geometry.image_size, images.crop, digest)
    if has_idx_files(path):
        idx = IdxImages(path, "train")
        height, width = idx.pixels.shape[1:]
        if height != width:
            raise UserError(f"{path}: its images are {width}x{height}, not square")
        digest = hashlib.sha256(idx.pixels.tobytes()).hexdigest()
        return MadeSource(path, len(idx.pixels), height, side, lambda n: np.asarray(idx.load(n).image), digest)
    return FolderSource(path, side)


def _of_tokens(path: Path, side: int | None) -> ImageSource:
    store = open_token_store(path)
    book, facts = store.codebook(), store.manifest
    if book is None:
        problem = f"holds codes of {facts.tokenizer.name} and nothing that shows them"
        raise UserError(f"{path}: {problem}; give the image store, or the folder of the images")
    view = CENTRE[facts.geometry.crops]

    def load(index: int) -> Array:
        return book.decode(torch.from_numpy(store.codes[index, view].astype(np.int64))[None])[0]

    own = facts.geometry.image_size
    digest = f"{facts.codes_digests} {book.digest}"
    return MadeSource(path, facts.num_images, own, side, load, digest, AS_TOKENS)
