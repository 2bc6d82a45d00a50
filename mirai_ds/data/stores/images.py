"""The image store: the S x S crop of every image once, as PNG, lossless WebP or JPEG; its views are slices.

    images-00000.bin ...   the encoded crops one after another, a shard for each block of images
    index.npy              (images, 3) int64: shard, first byte, length        labels.npy, names.txt, problems.jsonl
    manifest.json          counts, geometry, encoding, a digest for each shard

A shard is plain bytes with an index beside it because the data order draws any image at any time: tar-based formats
are read in sequence, and key-value stores add a dependency and a writer lock without adding digests.
"""

from __future__ import annotations

import io
import resource
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from mirai_ds.config import UserError
from mirai_ds.data.stores.files import (
    LABELS,
    MANIFEST,
    NAMES,
    PROBLEMS,
    StoreManifest,
    check_digest,
    complaints,
    open_array,
    read_labels,
    read_manifest,
    read_names,
)

Array = np.ndarray[Any, Any]

IMAGE_FORMAT: Literal["mirai_ds images 1"] = "mirai_ds images 1"
INDEX = "index.npy"


class ImageManifest(StoreManifest):
    """See the module."""

    format: Literal["mirai_ds images 1"] = IMAGE_FORMAT
    encoding: Literal["png", "webp", "jpeg"]
    quality: int | None = Field(None, ge=1, le=100, description="jpeg only; the others are lossless")
    index_digest: str
    shard_bytes: list[int] = Field(min_length=1)
    shard_digests: list[str]


@dataclass(frozen=True)
class ImageStore:
    """index (n, 3) int64 and labels (n,) int32 in memory; shards are mapped when first read."""

    path: Path
    manifest: ImageManifest
    index: Array
    labels: Array

    def names(self) -> list[str]:
        """File names in order; reads and checks names.txt."""
        return read_names(self.path, self.manifest)

    @cached_property
    def _shards(self) -> dict[int, Array]:
        return {}

    def _shard(self, shard: int) -> Array:
        """A shard mapped into memory.  A mapping holds a file open, and ImageNet has 1,252 shards where a process may
        usually open 1,024 files: a quarter of that number stay mapped."""
        content = self._shards.get(shard)
        if content is None:
            if len(self._shards) >= max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4):
                self._shards.pop(next(iter(self._shards)), None)  # whoever reads from it still has it
            content = self._shards[shard] = np.memmap(self.path / shard_name(shard), np.uint8, "r")
        return content

    def crop(self, image: int) -> Array:
        """The S x S crop of image `image`: uint8 (S, S, 3).  Raises UserError when its bytes are damaged."""
        from PIL import Image

        shard, start, length = (int(x) for x in self.index[image])
        content = self._shard(shard)
        side = self.manifest.geometry.views.side
        try:
            with Image.open(io.BytesIO(content[start : start + length].tobytes())) as encoded:
                pixels = np.asarray(encoded.convert("RGB"))
        except Exception as error:  # bytes from anywhere: Pillow's decoders raise nearly any type on them
            raise UserError(f"{self.path}: image {image} cannot be decoded ({type(error).__name__})") from None
        if pixels.shape != (side, side, 3):
            raise UserError(f"{self.path}: image {image} is {pixels.shape}, not {(side, side, 3)}")
        return pixels

    def files(self) -> list[str]:
        """Names of all files of the store, the manifest last."""
        shards = [shard_name(shard) for shard in range(len(self.manifest.shard_bytes))]
        return [*shards, INDEX, LABELS, NAMES, PROBLEMS, MANIFEST]

    def damages(self, progress: Callable[[int], None] = lambda _: None) -> list[str]:
        """Read everything and compare digests: a line for each damage.  progress is told the shards read so far."""
        damages = complaints(self.names, partial(check_digest, self.path / PROBLEMS, self.manifest.problems_digest))
        for shard, digest in enumerate(self.manifest.shard_digests):
            damages += complaints(partial(check_digest, self.path / shard_name(shard), digest))
            progress(shard + 1)
        return damages


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"images-{shard:05d}.bin"


def open_image_store(path: Path) -> ImageStore:
    """Open and check a store: manifest and its seal, index, labels, length of every shard.  Raises UserError.

    The digests of the shards are not read (`ImageStore.damages` does).
    """
    manifest = read_manifest(path, ImageManifest)
    if len(manifest.shard_digests) != len(manifest.shard_bytes):
        raise UserError(f"{path}: its manifest contradicts itself (shards); extract the store again")
    index = np.array(open_array(path / INDEX, "int64", (manifest.num_images, 3)))
    check_digest(path / INDEX, manifest.index_digest)
    for shard, size in enumerate(manifest.shard_bytes):
        file = path / shard_name(shard)
        if not file.is_file():
            raise UserError(f"{file}: no such file; the store is incomplete")
        if file.stat().st_size != size:
            raise UserError(f"{file}: has {file.stat().st_size} bytes, the manifest says {size}; it is damaged")
    return ImageStore(path, manifest, index, read_labels(path, manifest))
