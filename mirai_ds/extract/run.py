"""An extraction from its options to its store: plan, blocks on every rank, assembly on rank 0, tidying up.

There is no process group: ranks meet in the folder.  Every file appears whole or not at all, so a process may die at
any instant and the same command goes on, on any number of ranks.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mirai_ds.config import UserError
from mirai_ds.data.crops import Crops
from mirai_ds.data.image_sets import open_image_set
from mirai_ds.data.stores.files import MANIFEST, GeometryFacts, read_manifest
from mirai_ds.data.stores.images import ImageManifest
from mirai_ds.data.stores.tokens import TokenizerFacts, TokenManifest
from mirai_ds.extract.codes import CodesJob, assemble, keep_codebook
from mirai_ds.extract.images import Encoding, ImagesJob, assemble_images, encoder
from mirai_ds.resumable.parts import heartbeat, run_blocks, wait_for_parts
from mirai_ds.resumable.plan import (
    LISTING,
    PARTS,
    PLAN,
    Listing,
    WorkPlan,
    begin,
    check_same,
    pillow_version,
    read_listing,
    read_plan,
    torch_version,
    wait_for_plan,
)
from mirai_ds.resumable.progress import WorkProgress
from mirai_ds.runtime.distributed import World, local_device
from mirai_ds.tokenizer import Tokenizer, open_tokenizer

LARGEST_BLOCK = {"codes": 256, "images": 1024}  # 1024 crops of 384 pixels take 270 MB, twice while one is written
LISTING_SECONDS = 3600.0  # millions of files on a slow file system


@dataclass(frozen=True)
class Options:
    """What every extraction is told.  block: images done whole or not at all,
    by default 256 (codes) or 1024 (images), fewer of small sets.  upright: turn photographs by their orientation tag,
    which LlamaGen's extraction does not.  stall_timeout: seconds without a heartbeat."""

    images: Path
    out: Path
    size: int
    crops: Crops = "ten"
    crop_range: float = 1.1
    split: str | None = None
    block: int | None = None
    workers: int = 1
    strict: bool = False
    upright: bool = False
    stall_timeout: float = 300.0

    @property
    def geometry(self) -> GeometryFacts:
        """The geometry of the views to cut."""
        crop_range = self.crop_range if self.crops == "ten" else 1.0
        return GeometryFacts(image_size=self.size, crops=self.crops, crop_range=crop_range)

    def settings(self) -> dict[str, str]:
        """All settings that decide the content, as text."""
        geometry = {name: str(value) for name, value in self.geometry.model_dump().items()}
        turned = {"orientation": "applied"} if self.upright else {}
        others = {"split": self.split or "", "block": str(self.block or "auto"), "pillow": pillow_version()}
        return {**geometry, **others, **turned}


def extract_codes(
    options: Options, world: World, tokenizer_file: Path, precision: str = "fp32", batch: int = 64
) -> TokenManifest | None:
    """Every view of every image through a tokenizer into a token store at `options.out`.

    Call it on every rank with the same options.  Rank 0 returns the manifest once all is there, the others None when
    their own blocks are done.  Raises UserError.
    """
    device = local_device(world)
    tokenizer = open_tokenizer(tokenizer_file, str(device), precision)
    _check_tokenizer(tokenizer, tokenizer_file, options.size)
    settings = options.settings() | {
        "tokenizer": tokenizer.name, "tokenizer_digest": tokenizer.digest, "precision": precision,
        "batch": str(batch), "device": _device_name(device.type), **torch_version(),
    }  # fmt: skip
    facts = TokenizerFacts(name=tokenizer.name, digest=tokenizer.digest, vocab_size=tokenizer.vocab_size)

    def work(plan: WorkPlan, listing: Listing) -> None:
        job = CodesJob(plan, listing, options.geometry.views, tokenizer, batch, options.workers)

        def assemble_all() -> None:
            keep_codebook(tokenizer_file, options.out)
            assemble(job, plan, options.out, listing, options.geometry, facts)

        _run(job, plan, options, world, assemble_all)

    _extract("codes", options, world, settings, work)
    return read_manifest(options.out, TokenManifest) if world.rank == 0 else None


def extract_images(
    options: Options, world: World, encoding: Encoding = "webp", quality: int | None = None
) -> ImageManifest | None:
    """The S x S crop of every image into an image store at `options.out`; see `extract_codes`."""
    if quality is not None and encoding != "jpeg":
        raise UserError(f"--quality {quality}: {encoding} is lossless; use --format jpeg or leave it out")
    if encoding == "jpeg" and quality is None:
        quality = 95
    settings = options.settings() | {"encoding": encoding, "quality": str(quality or "")}

    def work(plan: WorkPlan, listing: Listing) -> None:
        side, encode = options.geometry.views.side, encoder(encoding, quality)
        job = ImagesJob(plan, listing, side, encode, options.out, options.workers)
        finish = partial(assemble_images, job, plan, options.out, listing, options.geometry, encoding, quality)
        _run(job, plan, options, world, finish)

    _extract("images", options, world, settings, work)
    return read_manifest(options.out, ImageManifest) if world.rank == 0 else None


def _run(
    job: CodesJob | ImagesJob, plan: WorkPlan, options: Options, world: World, assemble_all: Callable[[], object]
) -> None:
    """This rank's blocks; on rank 0 the wait for the others' and the assembly, which may do damaged blocks anew."""
    progress = WorkProgress(plan, options.out, speaks=world.rank == 0)
    try:
        with heartbeat(options.out, world.rank):
            run_blocks(job, plan, options.out, world.rank, world.size, options.strict, progress.tell)
        if world.rank == 0:
            wait_for_parts(options.out, plan, options.stall_timeout, progress.tell)
            progress.close()
            assemble_all()
    finally:
        progress.close()
        job.reader.close()


def _extract(
    kind: str, options: Options, world: World, settings: dict[str, str],
    work: Callable[[WorkPlan, Listing], None],
) -> None:  # fmt: skip
    """Agrees on a plan, does the work and removes what only unfinished stores need."""
    warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a file is in problems.jsonl
    out, source = options.out, str(options.images.resolve())
    with full_disks_in_one_line(out):
        plan = _agree(kind, options, world, settings, source)
        if plan is not None:
            work(plan, read_listing(out, plan))
        if world.rank == 0:
            tidy(out)


def _agree(kind: str, options: Options, world: World, settings: dict[str, str], source: str) -> WorkPlan | None:
    """The plan that all ranks follow; None when the store is finished already.  Raises UserError."""
    out = options.out
    if not (out / MANIFEST).is_file() and read_plan(out) is None and world.rank == 0:
        image_set = open_image_set(options.images, options.split)
        block = options.block or automatic_block(len(image_set.names), LARGEST_BLOCK[kind])
        plan = WorkPlan(kind, source, settings, block, len(image_set.names), image_set.classes)
        begin(out, plan, Listing(image_set.names, image_set.labels))
    begun = wait_for_plan(out, LISTING_SECONDS)
    if begun is None:
        made = read_manifest(out, TokenManifest if kind == "codes" else ImageManifest)
        check_same(out, WorkPlan(kind, "", made.made_with, 0, made.num_images, []), kind, None, settings)
        return None
    check_same(out, begun, kind, source, settings)
    return begun


@contextmanager
def full_disks_in_one_line(out: Path) -> Iterator[None]:
    """A file that cannot be written is the user's to mend; what is finished stays."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and (out / MANIFEST).is_file():
            return  # another start of the same command was faster and has tidied up
        problem = f"cannot be written ({error.strerror or error}); fix this and rerun the same command to resume"
        raise UserError(f"--out {out}: {problem}") from None


def automatic_block(images: int, largest: int) -> int:
    """At least 64 blocks where there are as many images, so that a kill costs little and progress is seen."""
    return max(1, min(largest, images // 64))


def tidy(out: Path) -> None:
    """Removes the files that only an unfinished store needs."""
    shutil.rmtree(out / PARTS, ignore_errors=True)
    for path in [out / PLAN, out / LISTING, *out.glob("*.tmp")]:
        path.unlink(missing_ok=True)


def _check_tokenizer(tokenizer: Tokenizer, file: Path, size: int) -> None:
    tokenizer.grid(size)
    if tokenizer.vocab_size > 65536:
        raise UserError(f"--tokenizer {file}: has {tokenizer.vocab_size} codes; a store holds 16 bits a code")
    if tokenizer.channels not in (1, 3):
        raise UserError(f"--tokenizer {file}: is for {tokenizer.channels} channels; images have 1 or 3")


def _device_name(kind: str) -> str:
    import torch

    return torch.cuda.get_device_name() if kind == "cuda" else kind
