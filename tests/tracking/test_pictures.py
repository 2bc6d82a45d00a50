"""Grids with names: which pixels are whose, and names that are too long."""

from __future__ import annotations

import numpy as np

from mirai_ds.data.meaning import Meaning, class_names
from mirai_ds.tracking.pictures import GAP, GREY, MOST_GUTTER, labelled_grid

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
SIDE = 64  # 8 pixels eight times as large


def at(grid: np.ndarray, row: int, column: int, left: int = 0, below: int = 0) -> np.ndarray:
    """The image in that place, as small as it was."""
    top, start = GAP + row * (SIDE + below + GAP), left + GAP + column * (SIDE + GAP)
    return grid[top : top + SIDE : 8, start : start + SIDE : 8]


def test_names_of_rows_stand_left_of_them() -> None:
    grid, plain = labelled_grid(IMAGES, 3, rows=["cat", "dog"]), labelled_grid(IMAGES, 3)
    left = grid.shape[1] - plain.shape[1]
    assert np.array_equal(grid[:, left:], plain)
    assert all(np.array_equal(at(grid, n // 3, n % 3, left), IMAGES[n]) for n in range(6))
    names = grid[:, :left]
    written = [np.flatnonzero((names[top : top + SIDE] > GREY).any((1, 2))) for top in (GAP, 2 * GAP + SIDE)]
    for rows in written:  # in the middle of their row
        assert abs(rows.mean() - SIDE / 2) < 6
    assert not np.array_equal(names[GAP : GAP + SIDE], names[2 * GAP + SIDE : 2 * GAP + 2 * SIDE])
    assert labelled_grid(IMAGES, 3, rows=["x" * 100, "y"]).shape[1] - plain.shape[1] == MOST_GUTTER


def test_few_images() -> None:
    """One alone has its frame and its name, and a last row that is not full is filled up."""
    one = labelled_grid(IMAGES[:1], 8, rows=["a"])
    assert one.shape[0] == SIDE + 2 * GAP
    assert np.array_equal(at(one, 0, 0, one.shape[1] - SIDE - 2 * GAP), IMAGES[0])
    four = labelled_grid(IMAGES[:4], 3)
    assert four.shape == (2 * (SIDE + GAP) + GAP, 3 * (SIDE + GAP) + GAP, 3)
    assert np.array_equal(at(four, 1, 0), IMAGES[3])
    assert (at(four, 1, 1) == GREY).all()


def test_captions_stand_below_their_images() -> None:
    grid = labelled_grid(IMAGES, 3, captions=["a", "b", "a", "b", "c" * 50, ""])
    below = (grid.shape[0] - GAP) // 2 - SIDE - GAP
    assert all(np.array_equal(at(grid, n // 3, n % 3, below=below), IMAGES[n]) for n in range(6))

    def strip(n: int) -> np.ndarray:
        top, start = GAP + (n // 3) * (SIDE + below + GAP) + SIDE, GAP + (n % 3) * (SIDE + GAP)
        return grid[top : top + below, start : start + SIDE]

    assert np.array_equal(strip(0), strip(2))
    assert not np.array_equal(strip(0), strip(1))
    assert (strip(5) == GREY).all()
    assert (strip(4)[:, :GAP] == GREY).all()  # cut, not written over its neighbour
    assert (strip(4)[:, -GAP:] == GREY).all()


def test_classes_by_name_or_number() -> None:
    assert class_names(Meaning(["cat", "dog"]), [1, 0, 2]) == ["dog", "cat", "2"]
    assert class_names(None, np.array([3])) == ["3"]
