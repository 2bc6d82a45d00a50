"""Images to codes: every view of every image through a tokenizer, in batches that cross images."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mirai_ds.config import UserError
from mirai_ds.data.crops import ViewGeometry
from mirai_ds.data.stores.files import GeometryFacts, open_array, write_lists, write_manifest
from mirai_ds.data.stores.tokens import CODES, DIGEST_IMAGES, TOKENIZER, TokenizerFacts, TokenManifest, code_digests
from mirai_ds.extract.crops import CropReader, CropResult, collect
from mirai_ds.resumable.parts import Part, ShardJob, load_or_redo_shard
from mirai_ds.resumable.plan import Listing, WorkPlan
from mirai_ds.runtime.disk import digest_of_file, replacing
from mirai_ds.tokenizer import Tokenizer

Array = np.ndarray[Any, Any]


class CodesJob:
    """Batches are cut inside a block, so they, and with them every rounding, are the same on any number of ranks."""

    def __init__(self, plan: WorkPlan, listing: Listing, geometry: ViewGeometry, tokenizer: Tokenizer, batch: int,
                 workers: int) -> None:  # fmt: skip
        """batch: views the tokenizer gets at once.  workers: reading threads."""
        self.geometry, self.tokenizer, self.batch = geometry, tokenizer, batch
        mode = "L" if tokenizer.channels == 1 else "RGB"
        self.reader = CropReader(plan, listing.names, geometry.side, mode, workers, then=np.asarray)

    def prepare(self, images: range) -> list[Future[CropResult[Array]]]:
        """See `parts.ShardJob`."""
        return self.reader.submit(images)

    def finish(self, prepared: list[Future[CropResult[Array]]], block: int) -> Part:
        """codes (kept, views, tokens) uint16 of a block."""
        kept, crops, problems = collect(prepared)
        views = self.geometry.num_views
        tokens = self.tokenizer.grid(self.geometry.image_size) ** 2
        parts = [self.tokenizer.encode(batch).numpy().astype(np.uint16) for batch in self._batches(crops)]
        codes = np.concatenate(parts) if parts else np.empty((0, tokens), np.uint16)
        return Part(np.array(kept, np.int64), {"codes": codes.reshape(len(kept), views, tokens)}, problems)

    def _batches(self, crops: list[Array]) -> Iterator[torch.Tensor]:
        """Yields uint8 (at most `batch`, c, c, C), image after image and view after view."""
        waiting: list[Array] = []
        for crop in crops:
            for view in range(self.geometry.num_views):
                waiting.append(self.geometry.view(crop, view))
                if len(waiting) == self.batch:
                    yield torch.from_numpy(np.stack(waiting))
                    waiting = []
        if waiting:
            yield torch.from_numpy(np.stack(waiting))


def assemble(job: ShardJob, plan: WorkPlan, folder: Path, listing: Listing, geometry: GeometryFacts,
             made_by: TokenizerFacts, drop: frozenset[int] = frozenset()) -> TokenManifest:  # fmt: skip
    """One array of all parts, lists and digests; the manifest last.  drop: images to leave out.  Returns the manifest.

    Killed at any instant and begun again it writes the same bytes.
    """
    kept: list[int] = []
    problems: list[dict[str, Any]] = []
    shape: tuple[int, ...] = ()
    for block in range(plan.blocks):
        part = load_or_redo_shard(job, plan, folder, block, arrays=not kept)
        shape = shape if kept else part.arrays["codes"].shape[1:]
        kept += [int(image) for image in part.kept if int(image) not in drop]
        problems += [problem._asdict() for problem in part.problems]
    if not kept:
        first = f"{problems[0]['name']}: {problems[0]['reason']}" if problems else "all were dropped"
        raise UserError(f"{plan.source}: not one image could be used; {first}")
    _write_codes(job, plan, folder, (len(kept), *shape), drop)
    codes = open_array(folder / CODES, "uint16", (len(kept), *shape))
    lists = write_lists(folder, (listing.names[image] for image in kept), listing.labels[kept], problems)
    manifest = TokenManifest(
        num_images=len(kept), num_views=shape[0], tokens_per_image=shape[1], geometry=geometry, classes=plan.classes,
        made_with=plan.settings, tokenizer=made_by, max_code=int(codes.max()), digest_images=DIGEST_IMAGES,
        codes_digests=list(code_digests(codes)), **lists,
        codebook_digest=digest_of_file(folder / TOKENIZER) if (folder / TOKENIZER).is_file() else None,
    )  # fmt: skip
    write_manifest(folder, manifest)
    return manifest


def _write_codes(job: ShardJob, plan: WorkPlan, folder: Path, shape: tuple[int, ...], drop: frozenset[int]) -> None:
    with replacing(folder / CODES) as beside:
        out = np.lib.format.open_memmap(beside, "w+", np.uint16, shape)
        at = 0
        for block in range(plan.blocks):
            part = load_or_redo_shard(job, plan, folder, block)
            chosen = [i for i, image in enumerate(part.kept) if int(image) not in drop]
            out[at : at + len(chosen)] = part.arrays["codes"][chosen]
            at += len(chosen)
        out.flush()
        del out


def keep_codebook(file: Path, folder: Path) -> None:
    """Put a patch codebook into the store: it is small, and its tokens are nothing without it."""
    if file.suffix == ".npz":
        with replacing(folder / TOKENIZER) as beside:
            shutil.copyfile(file, beside)
