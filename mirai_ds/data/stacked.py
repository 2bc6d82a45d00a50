"""Several stores of the same images as one: their views one after another, nothing copied.

Every store has as many views, so that a view drawn from all of them is a store drawn evenly and then one of its views.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mirai_ds.data.views import ViewSource

Array = np.ndarray[Any, Any]


class StackedCodes:
    """Codes (m, views, N) each, read as (m, stores * views, N): view v is view v % views of store v // views."""

    def __init__(self, parts: Sequence[Array]) -> None:
        """parts: arrays of one shape and type."""
        images, views, tokens = parts[0].shape
        self.parts, self.dtype, self.shape = tuple(parts), parts[0].dtype, (images, views * len(parts), tokens)

    def __getitem__(self, key: tuple[Array, Array | int]) -> Array:
        """Places (B,) and their views (B,), or one view of all: (B, N)."""
        places, views = np.broadcast_arrays(*key)
        found = np.empty((len(places), self.shape[2]), self.dtype)
        for store, rows, inside in _by_store(views, self.parts[0].shape[1]):
            found[rows] = self.parts[store][places[rows], inside]
        return found

    def max(self) -> int:
        """The largest code; reads all."""
        return max(int(part.max()) for part in self.parts)


class StackedViews:
    """Pixels of the same: of each store its own source."""

    def __init__(self, parts: Sequence[ViewSource], views: int) -> None:
        """views: of each store."""
        self.parts, self.views = tuple(parts), views

    def gather(self, images: Array, views: Array) -> Array:
        """See `ViewSource.gather`."""
        found: Array | None = None
        for store, rows, inside in _by_store(views, self.views):
            pixels = self.parts[store].gather(images[rows], inside)
            found = np.empty((len(images), *pixels.shape[1:]), pixels.dtype) if found is None else found
            found[rows] = pixels
        assert found is not None, "no images asked for"
        return found


def _by_store(views: Array, each: int) -> Iterator[tuple[int, Array, Array]]:
    """Of every store that is asked: its number, the rows that ask, and their views in it."""
    for store in np.unique(views // each).tolist():
        rows = np.flatnonzero(views // each == store)
        yield store, rows, views[rows] % each
