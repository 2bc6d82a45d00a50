"""Labelled images as files: a folder for each class (torchvision's ImageFolder), or idx files (Fashion-MNIST)."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageOps

from mirai_ds.config import UserError
from mirai_ds.data.crops import BadImageError
from mirai_ds.data.folder_walk import EXTENSIONS, Walk, is_hidden, splits_among
from mirai_ds.runtime.log import LOG

Array = np.ndarray[Any, Any]

IDX_SPLITS = ("train", "t10k")
# Nothing is lost silently below this: enlarging fewer pixels gives a blur, which its owner may not have meant.
SMALL_SIDE = 32
SHOWN_CLASSES = 12
EVERYTHING = "all"  # the class of images that lie in no class folder
ORIENTATION, TAG = 0x0112, "its orientation tag"


class Loaded(NamedTuple):
    """An RGB (or L) image, and what had to be done to get it (None: nothing of note)."""

    image: Image.Image
    note: str | None


class ImageSet(Protocol):
    """n images in a fixed order.  names: unique text a file; labels (n,) int32; classes: names in label order."""

    root: Path
    names: list[str]
    labels: Array
    classes: list[str]

    def load(self, index: int, mode: str = "RGB") -> Loaded:
        """Image `index` in Pillow mode RGB or L; raises BadImageError."""
        ...


class FolderImages:
    """ImageFolder's order: sorted class folders, files sorted within each folder below them, links followed.

    A folder without class folders, but with images, is one class, `EVERYTHING`.  Hidden and system folders and files
    are left out; what was left out is logged.
    """

    def __init__(self, root: Path, upright: bool = False) -> None:
        """upright: as in `read_image`.  Raises UserError for folders without images, links that lead back and splits in
        place of classes."""
        self.root, self.upright, walk = root, upright, Walk(root)
        images = {name: walk.images(name) for name in walk.classes()}
        if not images:
            walk = Walk(root)
            flat = walk.images()
            images = {EVERYTHING: flat} if flat else {}
        self.classes = list(images)
        walk.tell()
        _refuse_splits(root, images)
        empty = next((name for name in self.classes if not images[name]), None)
        if empty is not None:
            raise UserError(f"{root / empty}: holds no images ({', '.join(EXTENSIONS)}); remove the folder or fill it")
        self.names = [path for name in self.classes for path in images[name]]
        self.labels = np.repeat(np.arange(len(images), dtype=np.int32), [len(paths) for paths in images.values()])

    def load(self, index: int, mode: str = "RGB") -> Loaded:
        """See `ImageSet.load`."""
        return read_image(self.root / self.names[index], mode, self.upright)


class IdxImages:
    """The four files of MNIST and its relatives, .gz or not; names are `train/000042`."""

    def __init__(self, root: Path, split: str) -> None:
        self.root = root
        images = read_idx(_idx_file(root, split, "images", 3))
        labels = read_idx(_idx_file(root, split, "labels", 1))
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or len(images) == 0:
            raise UserError(f"{root}: {split} images {images.shape} and labels {labels.shape} do not belong together")
        self.pixels, self.labels = images, labels.astype(np.int32)
        self.classes = [str(label) for label in range(int(labels.max()) + 1)]
        self.names = [f"{split}/{i:06d}" for i in range(len(images))]

    def load(self, index: int, mode: str = "RGB") -> Loaded:
        """See `ImageSet.load`."""
        return Loaded(Image.fromarray(self.pixels[index]).convert(mode), None)


class NamedImages:
    """The images of a list made earlier: file names below `root`, or `train/000042` of idx files.

    Names are one block of bytes, which forked workers share without copying.
    """

    def __init__(self, root: Path, names: list[str], upright: bool = False) -> None:
        """upright: as in `read_image`.  Raises UserError when idx files are there and the names are not theirs, and for
        names that leave `root`."""
        outside = next((name for name in names if name.startswith("/") or ".." in name.split("/")), None)
        if outside is not None:
            raise UserError(f"{root}: the store's list of names has {outside!r}, which is not below that folder")
        self.root, self.upright, self._names = root, upright, np.array([name.encode() for name in names])
        self._idx: IdxImages | None = None
        if has_idx_files(root):
            split = names[0].split("/")[0]
            if split not in IDX_SPLITS:
                raise UserError(f"{root}: holds idx files, the list is of {names[0]!r}")
            self._idx = IdxImages(root, split)

    def name(self, index: int) -> str:
        """Of image `index`."""
        return str(self._names[index].decode())

    def load(self, index: int, mode: str = "RGB") -> Loaded:
        """See `ImageSet.load`."""
        if self._idx is not None:
            return self._idx.load(int(self.name(index).split("/")[1]), mode)
        return read_image(self.root / self.name(index), mode, self.upright)

    def labels(self) -> Array | None:
        """(n,) int32 of the idx files, in the list's order; of other files None: their class is in their name."""
        if self._idx is None:
            return None
        return self._idx.labels[[int(self.name(image).split("/")[1]) for image in range(len(self._names))]]

    def missing(self) -> str | None:
        """The first of three samples of the list that is not there; None when all are."""
        if self._idx is not None:
            return None
        last = len(self._names) - 1
        return next((name for i in (0, last // 2, last) if not (self.root / (name := self.name(i))).is_file()), None)


def has_idx_files(root: Path) -> bool:
    """Whether a folder holds images of the idx format."""
    return any(not is_hidden(path.name) for path in root.glob("*-images[-.]idx3-ubyte*"))


def open_image_set(path: Path, split: str | None = None, upright: bool = False) -> ImageSet:
    """The images at `path`, by what lies there.  split: train (default) or t10k of idx files.  upright: as in
    `read_image`.  Raises UserError."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give one with a folder for each class, or with idx files")
    images: ImageSet
    if has_idx_files(path):
        if split not in (None, *IDX_SPLITS):
            raise UserError(f"split = {split!r}: idx files have {' and '.join(IDX_SPLITS)}")
        images = IdxImages(path, split or "train")
    elif split is not None:
        raise UserError(f"split = {split!r}: is for idx files; {path} has none, give the split's folder itself")
    else:
        images = FolderImages(path, upright)
    if not images.names:
        problem = f"has no class folders and no images ({', '.join(EXTENSIONS)})"
        raise UserError(f"{path}: {problem}; put the images into one folder for each class")
    bad = next((name for name in images.names if "\n" in name or "\r" in name or not _is_text(name)), None)
    if bad is not None:
        raise UserError(f"{path}: the file name {bad!r} holds a line break or is not UTF-8; rename it")
    _tell_classes(images)
    return images


def _refuse_splits(root: Path, images: dict[str, list[str]]) -> None:
    splits = splits_among(images)
    if splits:
        names, look = " and ".join(splits), "looks like a split" if len(splits) == 1 else "look like splits"
        inside = any(path.count("/") > 1 for path in images[splits[0]])
        better = (
            f"give e.g. {root / splits[0]}" if inside else "put the images of a split into one folder for each class"
        )
        raise UserError(f"{root}: {names} {look}, not classes: every image would be labelled by its split; {better}")


def _tell_classes(images: ImageSet) -> None:
    """Logs what was taken for classes, before hours of work are spent on it."""
    counts = np.bincount(images.labels, minlength=len(images.classes))
    pairs = [f"{name} {count}" for name, count in zip(images.classes, counts.tolist(), strict=True)]
    shown = pairs if len(pairs) <= SHOWN_CLASSES else [*pairs[: SHOWN_CLASSES - 2], "...", pairs[-1]]
    LOG.info("%s: %d images in %d classes: %s", images.root, len(images.names), len(pairs), ", ".join(shown))
    by_number = sorted(images.classes, key=int) if all(name.isdecimal() for name in images.classes) else images.classes
    first = next((label for label, name in enumerate(images.classes) if name != by_number[label]), None)
    if first is not None:
        LOG.warning(
            "%s: class folders are numbers and sorted as text, as ImageFolder does: folder %s has label %d; "
            "zero-padded names have labels in the order of the numbers", images.root, images.classes[first], first,
        )  # fmt: skip


def read_image(path: Path, mode: str = "RGB", upright: bool = False) -> Loaded:
    """A file as ImageFolder reads it: the first frame, converted to `mode`.  upright: turned by its orientation tag,
    which ImageFolder does not look at (Pillow itself turns TIFF files).

    Raises BadImageError for what Pillow cannot read whole and for modes that it would clip to 8 bits; UserError where
    the file system fails, which says nothing about the image.
    """
    try:
        with Image.open(path) as image:
            notes = _notes(image)
            if image.mode[0] in "IF":
                raise BadImageError(f"has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
            image.load()  # formats may say their orientation behind the pixels
            turned = _orientation(image)
            if turned != 1:
                notes.append(f"{'turned by' if upright else 'not turned by'} {TAG} ({turned})")
            whole = ImageOps.exif_transpose(image) if upright and turned != 1 else image
            return Loaded(whole.convert(mode), "; ".join(notes) or None)
    except (BadImageError, MemoryError):
        raise
    except OSError as error:
        if error.errno is not None:
            raise UserError(f"{path}: cannot be opened ({error.strerror})") from None
        raise _unreadable(error, path) from None
    except Exception as error:  # bytes from anywhere: Pillow's decoders raise nearly any type on them
        raise _unreadable(error, path) from None


def _unreadable(error: Exception, path: Path) -> BadImageError:
    reason = (str(error).splitlines() or [""])[0].replace(str(path), "the file")
    return BadImageError(f"cannot be read: {type(error).__name__}: {reason[:160]}")


def _orientation(image: Image.Image) -> int:
    """The EXIF tag, 1 to 8; 1 where there is none that can be read."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # bytes from anywhere; ImageFolder reads the pixels without looking at them
        return 1
    return value if value in range(2, 9) else 1


def _notes(image: Image.Image) -> list[str]:
    notes = []
    if any(_deep(tile[3]) for tile in getattr(image, "tile", [])):
        notes.append("more than 8 bits a channel reduced to 8")
    if getattr(image, "is_animated", False):
        notes.append(f"first of {getattr(image, 'n_frames', 'several')} frames taken")
    if image.mode in ("CMYK", "YCbCr"):
        notes.append(f"{image.mode} converted to RGB")
    if image.mode in ("P", "PA"):
        notes.append("palette converted to RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        notes.append("transparency dropped")
    if min(image.size) < SMALL_SIDE:
        notes.append(f"only {image.width}x{image.height} pixels")
    return notes


def _deep(decoding: Any) -> bool:
    """Whether Pillow's arguments of a decoder are of RGB with more than 8 bits, of which it keeps the high ones."""
    parts = decoding if isinstance(decoding, tuple) else (decoding,)
    if len(parts) == 2 and isinstance(parts[1], int):  # of a PPM file: mode and largest value
        return parts[1] > 255
    return isinstance(parts[0], str) and ";16" in parts[0] and parts[0].startswith(("RGB", "LA", "CMYK"))


def read_idx(path: Path) -> Array:
    """The array of an idx file of unsigned bytes (Yann LeCun's MNIST format), .gz or not.  Raises UserError."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch it again") from None
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise UserError(f"{path}: is not an idx file of bytes (it begins with {data[:4].hex(' ') or 'nothing'})")
    dimensions, start = data[3], 4 + 4 * data[3]
    if len(data) < start:
        raise UserError(f"{path}: is cut short in its header")
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    wanted = int(np.prod(shape, dtype=object))
    if len(data) - start != wanted:
        raise UserError(f"{path}: holds {len(data) - start} bytes, its header {shape} promises {wanted}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _idx_file(root: Path, split: str, what: str, dimensions: int) -> Path:
    files = sorted(root.glob(f"{split}-{what}[-.]idx{dimensions}-ubyte*"), key=lambda path: path.suffix == ".gz")
    if not files:
        raise UserError(f"{root}: has no {split}-{what}-idx{dimensions}-ubyte or .gz")
    return files[0]


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
