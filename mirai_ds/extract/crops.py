"""Blocks of centre crops, read by a pool of threads: Pillow gives up the interpreter while it decodes and resizes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from mirai_ds.data.crops import BadImageError, centre_crop
from mirai_ds.data.image_sets import NamedImages
from mirai_ds.resumable.parts import Problem

Array = np.ndarray[Any, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Found(Generic[T]):
    """One image: what was made of its crop, or None, and what was found about it."""

    image: int
    value: T | None
    problem: Problem | None


class CropReader(Generic[T]):
    """Reads images of a listing, cuts their S x S centres (uint8, S x S x C), calls `then` in the same thread."""

    def __init__(
        self, source: Path, names: list[str], side: int, mode: str, workers: int, then: Callable[[Array], T]
    ) -> None:
        """mode: Pillow's, RGB or L.  names as in `NamedImages`."""
        self.images, self.side, self.mode, self.then = NamedImages(source, names), side, mode, then
        self.pool = ThreadPoolExecutor(workers)

    def submit(self, images: range) -> list[Future[Found[T]]]:
        """Begin reading a block."""
        return [self.pool.submit(self._read, image) for image in images]

    def _read(self, image: int) -> Found[T]:
        name = self.images.name(image)
        try:
            loaded = self.images.load(image, self.mode)
            value = self.then(centre_crop(loaded.image, self.side))
        except BadImageError as error:
            return Found(image, None, Problem(image, name, False, str(error)))
        problem = None if loaded.note is None else Problem(image, name, True, loaded.note)
        return Found(image, value, problem)

    def close(self) -> None:
        """End the threads."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def collect(futures: list[Future[Found[T]]]) -> tuple[list[int], list[T], list[Problem]]:
    """Numbers and values of the images that could be read, in order, and all problems."""
    found = [future.result() for future in futures]
    kept = [(f.image, f.value) for f in found if f.value is not None]
    problems = [f.problem for f in found if f.problem is not None]
    return [image for image, _ in kept], [value for _, value in kept], problems
