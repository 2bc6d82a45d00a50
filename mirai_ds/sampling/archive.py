"""An ADM sample file, written image by image: an .npz whose `arr_0` is uint8 (n, H, W, 3).

np.savez would need all of it in memory (9.8 GB for 50,000 images of 256 pixels); here a zip member is written from
batches, stored and not compressed as ADM's and LlamaGen's files are.  The bytes depend on the images alone.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from mirai_ds.runtime.disk import digest_of_file, replacing

Array = np.ndarray[Any, Any]

ARRAY = "arr_0"
# Of every member: a file made again is the same file.  1980 is the earliest that zip knows.
DATE = (1980, 1, 1, 0, 0, 0)


def npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    """The header of a .npy file in C order."""
    header = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue()


def write_sample_archive(path: Path, batches: Iterable[Array], shape: tuple[int, int, int, int]) -> str:
    """Write `arr_0` of `shape` (n, H, W, 3) from batches uint8 (b, H, W, 3), n images in all; holds one at a time.

    Whole or not at all: under another name first, flushed to disk, then renamed.  Returns sha256 (hex) of the file.
    Raises ValueError when the batches are not what `shape` says, OSError when the file cannot be written.
    """
    with replacing(path) as part:
        with part.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            member = zipfile.ZipInfo(f"{ARRAY}.npy", DATE)
            with archive.open(member, "w", force_zip64=True) as stream:  # its length may exceed 4 GiB
                stream.write(npy_header(shape, "uint8"))
                _write_pixels(stream, batches, shape)
        return digest_of_file(part)


def _write_pixels(stream: IO[bytes], batches: Iterable[Array], shape: tuple[int, int, int, int]) -> None:
    count = 0
    for batch in batches:
        if batch.dtype != np.uint8 or batch.shape[1:] != shape[1:]:
            raise ValueError(f"a batch of {batch.dtype} {batch.shape} in an archive of uint8 {shape}")
        count += len(batch)
        stream.write(np.ascontiguousarray(batch).reshape(-1).data)
    if count != shape[0]:
        raise ValueError(f"{count} images in an archive of {shape[0]}")
