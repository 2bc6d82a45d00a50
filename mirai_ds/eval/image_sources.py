"""Images to judge, batch by batch: ADM's .npz (never whole in memory), or a folder of image files."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from mirai_ds.config import UserError
from mirai_ds.data.crops import BadImageError, centre_crop
from mirai_ds.data.folder_walk import EXTENSIONS, Walk, splits_among
from mirai_ds.data.image_sets import Loaded, read_image
from mirai_ds.runtime.disk import digest_of_file
from mirai_ds.runtime.log import LOG
from mirai_ds.runtime.weight_files import first_line

if TYPE_CHECKING:
    from PIL import Image

Array = np.ndarray[Any, Any]

# ADM's name, and that of `mirai-ds sample`'s tokens.npz.
KEYS = ("arr_0", "images")
AS_THEY_ARE = "as they are"
FIT = (
    "each image's centre square at the samples' size: ADM's centre crop, halved by a box filter while twice too large, "
    "then bicubic"
)


class ImageSource(Protocol):
    """`count` images of height x width pixels in a fixed order."""

    path: Path
    count: int
    height: int
    width: int
    fit: str  # how they came to be of one size

    def batches(self, size: int) -> Iterator[Array]:
        """uint8 (size, height, width, 3) each, the last one shorter; grey images are repeated.  Raises UserError."""
        ...

    def digest(self) -> str:
        """sha256, hexadecimal, of all that decides the images."""
        ...


def open_images(path: Path) -> ImageSource:
    """The images at `path`: an .npz file with arr_0, or a folder.  Raises UserError."""
    return FolderSource(path) if path.is_dir() else NpzSource(path)


class Member(NamedTuple):
    """What an .npy member's header says."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool


class NpzSource:
    """uint8 (n, H, W, 3 or 1) in `arr_0`, read in order; compressed or not."""

    fit = AS_THEY_ARE

    def __init__(self, path: Path) -> None:
        self.path = path
        members = npz_members(path)
        key = next((key for key in KEYS if key in members), None)
        if key is None:
            raise UserError(f"{path}: has no images (arr_0); it holds {', '.join(sorted(members)[:8]) or 'nothing'}")
        self._member = f"{key}.npy"
        shape, dtype, fortran = members[key]
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or min(shape) < 1:
            raise UserError(f"{path}: {key} is {dtype} {shape}; it must be uint8 (n, height, width, 3)")
        if fortran:
            raise UserError(f"{path}: {key} is stored column by column; write it again from numpy.ascontiguousarray")
        self.count, self.height, self.width, self._channels = shape

    def batches(self, size: int) -> Iterator[Array]:
        """See `ImageSource.batches`.  Reading to the end checks the member's checksum."""
        image = self.height * self.width * self._channels
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self._member) as file:
                _read_header(file)
                for start in range(0, self.count, size):
                    wanted = min(size, self.count - start)
                    data = file.read(wanted * image)
                    if len(data) < wanted * image:
                        raise EOFError(f"ends after {start + len(data) // image} of {self.count} images")
                    batch = np.frombuffer(data, np.uint8).reshape(wanted, self.height, self.width, self._channels)
                    yield np.repeat(batch, 3, axis=3) if self._channels == 1 else batch
                if file.read(1):
                    raise ValueError("goes on after its last image")
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{self.path}: {self._member} is damaged ({first_line(error)}); make it again") from None

    def digest(self) -> str:
        """sha256 of the file."""
        return digest_of_file(self.path)


def npz_members(path: Path) -> dict[str, Member]:
    """Shape and type of every array of an .npz file by the headers alone.  Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: is not an .npz file, or is cut short")
    members = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".npy"):
                    with archive.open(name) as file:
                        members[name.removesuffix(".npy")] = _read_header(file)
    except Exception as error:  # bytes from anywhere: NumPy's header parser raises nearly any type on them
        raise UserError(f"{path}: is not a readable .npz file of plain arrays ({first_line(error)})") from None
    return members


def _read_header(file: IO[bytes]) -> Member:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array is of .npy format {version[0]}.{version[1]}, which holds no plain numbers")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return Member(tuple(shape), dtype, bool(fortran) and len(shape) > 1)


class FolderSource:
    """All image files below a folder, by their path's order; every one must be of the same size, by its header, or is
    brought to it."""

    def __init__(self, path: Path, side: int | None = None) -> None:
        """side: pixels a side that they are to have (`FIT`); None: they must be of one size, whatever it is."""
        self.path, walk, self.fit, self._side = path, Walk(path), AS_THEY_ARE, None
        self.names = sorted(walk.images())
        walk.tell()
        if not self.names:
            raise UserError(f"{path}: holds no images ({', '.join(EXTENSIONS)})")
        folders = {top: list(names) for top, names in groupby(self.names, lambda name: name.partition("/")[0])}
        splits = splits_among(folders)
        if len(splits) > 1:
            problem = (
                f"look like splits, whose images would be judged together; give one of them, e.g. {path / splits[0]}"
            )
            raise UserError(f"{path}: {' and '.join(splits)} {problem}")
        self.count = len(self.names)
        self.width, self.height = self._read(self.names[0]).image.size
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            sizes = [*pool.map(self._size, self.names)]
        if side is not None and set(sizes) != {(side, side)}:
            self.width = self.height = self._side = side
            self.fit = FIT
            return
        for name, size in zip(self.names, sizes, strict=True):
            self._check_size(name, size)

    def _size(self, name: str) -> tuple[int, int]:
        """(width, height), and nothing else read of a file that is whole."""
        from PIL import Image

        try:
            with Image.open(self.path / name) as image:
                return image.width, image.height
        except Exception:  # Pillow raises nearly any type; what reads the image says what is wrong with it
            return self._read(name).image.size

    def _check_size(self, name: str, size: tuple[int, int]) -> None:
        if size != (self.width, self.height):
            sizes = f"{size[0]}x{size[1]}, {self.names[0]} is {self.width}x{self.height}"
            raise UserError(f"{self.path / name}: is {sizes}; bring all images to one size")

    def _read(self, name: str) -> Loaded:
        try:
            loaded = read_image(self.path / name)
            return loaded if self._side is None else Loaded(fitted(loaded.image, self._side), loaded.note)
        except BadImageError as error:
            raise UserError(f"{self.path / name}: {error}; remove it or make it again") from None

    def batches(self, size: int) -> Iterator[Array]:
        """See `ImageSource.batches`.  The next batch is read meanwhile; at the end conversions are logged."""
        notes: Counter[str] = Counter()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            pending = [pool.submit(self._read, name) for name in self.names[:size]]
            for start in range(0, self.count, size):
                coming = self.names[start + size : start + 2 * size]
                images = [future.result() for future in pending]
                pending = [pool.submit(self._read, name) for name in coming]
                for name, (image, _) in zip(self.names[start : start + size], images, strict=True):
                    self._check_size(name, image.size)  # a file may have changed since
                notes.update(note for _, note in images if note is not None and not note.startswith("only "))
                yield np.stack([np.asarray(image) for image, _ in images])
        for note, count in notes.items():
            LOG.warning("%s: %d images: %s", self.path, count, note)

    def digest(self) -> str:
        """sha256 over names and the files' own sha256, in order."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(f"{name}\0{digest_of_file(self.path / name)}\n".encode(errors="surrogateescape"))
        if self._side is not None:
            digest.update(f"{self.fit} {self._side}".encode())
        return digest.hexdigest()


def fitted(image: Image.Image, side: int) -> Image.Image:
    """The image as `FIT` says, an RGB one of `side` pixels a side; itself where it has that size.  Raises
    BadImageError."""
    if image.size == (side, side):
        return image
    from PIL import Image as Pillow

    return Pillow.fromarray(centre_crop(image, side))
