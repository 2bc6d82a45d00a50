"""A header that NumPy's parser chokes on (it may raise tokenize.TokenError) is a mistake in one line everywhere."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mirai_ds.data.npz_file import from_npz
from mirai_ds.extract.llamagen import _load
from mirai_ds.selfcheck.vectors import Vector
from mirai_ds.tokenizer import PatchCodebook
from tests.one_line import one_line


def broken(array: np.ndarray) -> bytes:
    """A .npy whose shape's bracket never closes."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    data = buffer.getvalue()
    return data.replace(b",), }", b",(, }", 1).replace(b"), }", b"(, }", 1)


READERS: list[Callable[[Path], object]] = [
    lambda path: from_npz(str(path)), PatchCodebook.load, lambda path: Vector(path),
]  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_npz(reader: Callable[[Path], object], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        for name in ("codes", "labels", "codebook", "kind"):
            file.writestr(f"{name}.npy", broken(np.zeros((3, 4), np.int64)))
    one_line(lambda: reader(tmp_path / "a.npz"), "is not a readable .npz file")


def test_npy(tmp_path: Path) -> None:
    (tmp_path / "0.npy").write_bytes(broken(np.zeros((1, 10, 16), np.int64)))
    found = _load(tmp_path / "0.npy")
    assert isinstance(found, str)
    assert "0.npy: cannot be read" in found
