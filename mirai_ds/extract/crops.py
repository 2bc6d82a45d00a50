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
from mirai_ds.resumable.plan import WorkPlan

Array = np.ndarray[Any, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class CropResult(Generic[T]):
    """One image: what was made of its crop, or None, and the problem with it, or None."""

    image: int
    value: T | None
    problem: Problem | None


class CropReader(Generic[T]):
    """Reads images of a listing, cuts their S x S centres (uint8, S x S x C), calls `then` in the same thread."""

    def __init__(
        self, plan: WorkPlan, names: list[str], side: int, mode: str, workers: int, then: Callable[[Array], T]
    ) -> None:
        """mode: Pillow's, RGB or L.  names as in `NamedImages`."""
        self.images = NamedImages(Path(plan.source), names, plan.settings.get("orientation") == "applied")
        self.side, self.mode, self.then = side, mode, then
        self.pool = ThreadPoolExecutor(workers)

    def submit(self, images: range) -> list[Future[CropResult[T]]]:
        """Begins to read a block."""
        return [self.pool.submit(self._read, image) for image in images]

    def _read(self, image: int) -> CropResult[T]:
        name = self.images.name(image)
        try:
            loaded = self.images.load(image, self.mode)
            value = self.then(centre_crop(loaded.image, self.side))
        except BadImageError as error:
            return CropResult(image, None, Problem(image, name, False, str(error)))
        problem = None if loaded.note is None else Problem(image, name, True, loaded.note)
        return CropResult(image, value, problem)

    def close(self) -> None:
        """Ends the threads."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def collect(futures: list[Future[CropResult[T]]]) -> tuple[list[int], list[T], list[Problem]]:
    """Numbers and values of the images that could be read, in order, and all problems."""
    results = [future.result() for future in futures]
    kept = [(r.image, r.value) for r in results if r.value is not None]
    problems = [r.problem for r in results if r.problem is not None]
    return [image for image, _ in kept], [value for _, value in kept], problems
