"""Images to an image store: one encoded S x S crop each, a shard a block."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from mirai_ds.config import UserError
from mirai_ds.data.stores.files import GeometryFacts, write_array, write_lists, write_manifest
from mirai_ds.data.stores.images import INDEX, ImageManifest, shard_name
from mirai_ds.extract.crops import CropReader, CropResult, collect
from mirai_ds.resumable.parts import Part, load_or_redo_shard
from mirai_ds.resumable.plan import Listing, WorkPlan
from mirai_ds.runtime.disk import digest_of_file, write_whole

Array = np.ndarray[Any, Any]

Encoding = Literal["png", "webp", "jpeg"]
ENCODINGS: dict[Encoding, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 6},
    "webp": {"format": "WEBP", "lossless": True, "quality": 50, "method": 0},  # smaller than PNG, a quarter of its time
    "jpeg": {"format": "JPEG", "subsampling": 0},
}


def encoder(encoding: Encoding, quality: int | None) -> Callable[[Array], bytes]:
    """uint8 (S, S, 3) -> bytes.  png and webp are lossless; quality is for jpeg."""
    options = dict(ENCODINGS[encoding])
    if quality is not None:
        options["quality"] = quality

    def encode(crop: Array) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(crop).save(buffer, **options)
        return buffer.getvalue()

    return encode


class ImagesJob:
    """A block's crops, encoded in the reading threads and written as one shard."""

    def __init__(self, plan: WorkPlan, listing: Listing, side: int, encode: Callable[[Array], bytes], folder: Path,
                 workers: int) -> None:  # fmt: skip
        self.folder = folder
        self.reader = CropReader(plan, listing.names, side, "RGB", workers, then=encode)

    def prepare(self, images: range) -> list[Future[CropResult[bytes]]]:
        """See `parts.ShardJob`."""
        return self.reader.submit(images)

    def finish(self, prepared: list[Future[CropResult[bytes]]], block: int) -> Part:
        """Writes the shard; lengths (kept,) int64 and the shard's digest are the part."""
        kept, encoded, problems = collect(prepared)
        shard = b"".join(encoded)
        write_whole(self.folder / shard_name(block), shard)
        digest = np.frombuffer(hashlib.sha256(shard).hexdigest().encode(), np.uint8)
        lengths = np.array([len(data) for data in encoded], np.int64)
        return Part(np.array(kept, np.int64), {"lengths": lengths, "digest": digest}, problems)


def assemble_images(job: ImagesJob, plan: WorkPlan, folder: Path, listing: Listing, geometry: GeometryFacts,
                    encoding: Encoding, quality: int | None) -> ImageManifest:  # fmt: skip
    """Index, lists and manifest over the finished shards.  Returns the manifest."""
    kept: list[int] = []
    problems: list[dict[str, Any]] = []
    rows: list[Array] = []
    sizes: list[int] = []
    digests: list[str] = []
    for block in range(plan.blocks):
        part = _whole_part(job, plan, folder, block)
        ends = np.cumsum(part.arrays["lengths"])
        rows.append(
            np.stack([np.full(len(ends), block), ends - part.arrays["lengths"], part.arrays["lengths"]], axis=1)
        )
        sizes.append(int(ends[-1]) if len(ends) else 0)
        digests.append(part.arrays["digest"].tobytes().decode())
        kept += part.kept.tolist()
        problems += [problem._asdict() for problem in part.problems]
    if not kept:
        raise UserError(f"{plan.source}: not one image could be read; {problems[0]['name']}: {problems[0]['reason']}")
    write_array(folder / INDEX, np.concatenate(rows).astype(np.int64))
    lists = write_lists(folder, (listing.names[image] for image in kept), listing.labels[kept], problems)
    manifest = ImageManifest(
        num_images=len(kept), geometry=geometry, classes=plan.classes, made_with=plan.settings, encoding=encoding,
        quality=quality, index_digest=digest_of_file(folder / INDEX), shard_bytes=sizes, shard_digests=digests, **lists,
    )  # fmt: skip
    write_manifest(folder, manifest)
    return manifest


def _whole_part(job: ImagesJob, plan: WorkPlan, folder: Path, block: int) -> Part:
    """A part if its shard is complete; otherwise both are made anew."""
    shard = folder / shard_name(block)

    def whole(part: Part) -> bool:
        return shard.is_file() and shard.stat().st_size == int(part.arrays["lengths"].sum())

    return load_or_redo_shard(job, plan, folder, block, whole=whole)
