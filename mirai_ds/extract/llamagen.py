"""LlamaGen's extracted folders into a token store: `<i>.npy` of codes (1, views, N) int64 and of labels (1,).

Its DistributedSampler pads the last batch, so real folders may end with copies of the first images; its writers may
have died and left holes.  Both change training silently there; here they are refused with a list.
"""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mirai_ds.config import UserError
from mirai_ds.data.folder_walk import is_hidden
from mirai_ds.data.image_sets import FolderImages, open_image_set
from mirai_ds.data.stores.files import MANIFEST, read_manifest
from mirai_ds.data.stores.tokens import TokenizerFacts, TokenManifest
from mirai_ds.extract.codes import assemble, keep_codebook
from mirai_ds.extract.run import LARGEST_BLOCK, Options, automatic_block, full_disks_in_one_line, tidy
from mirai_ds.resumable.parts import Part, load_or_redo_shard, run_blocks
from mirai_ds.resumable.plan import Listing, WorkPlan, begin, check_same, read_plan
from mirai_ds.resumable.progress import WorkProgress
from mirai_ds.runtime.log import LOG
from mirai_ds.tokenizer import open_tokenizer

Array = np.ndarray[Any, Any]

SHOWN = 20  # lines of a list of complaints
DEFAULT_VOCABULARY = 16384
CROP_RANGE = 1.1  # of `..._ten_crop`; that of `..._ten_crop_105` is 1.05


@dataclass(frozen=True)
class Import:
    """What to read and what to do about copies.  images: the folder that was extracted, for names and classes."""

    folder: Path
    options: Options
    images: Path | None = None
    tokenizer: Path | None = None
    drop_padding: bool = False
    keep_duplicates: bool = False


class ImportJob:
    """Reads a block's files with a pool of threads."""

    def __init__(self, codes: Path, labels: Path, block_images: int, workers: int) -> None:
        self.codes, self.labels, self.block_images = codes, labels, block_images
        self.reader = ThreadPoolExecutor(workers)

    def prepare(self, images: range) -> list[Future[tuple[Array, int] | str]]:
        """See `parts.ShardJob`."""
        return [self.reader.submit(self._read, image) for image in images]

    def finish(self, prepared: list[Future[tuple[Array, int] | str]], block: int) -> Part:
        """codes (n, views, N) uint16 and labels (n,) int32; raises UserError with a list of unfit files."""
        entries = [future.result() for future in prepared]
        read = [entry for entry in entries if not isinstance(entry, str)]
        shapes = sorted({codes.shape for codes, _ in read})
        bad = [entry for entry in entries if isinstance(entry, str)]
        if len(shapes) > 1:
            bad.append(f"{self.codes}: files of shapes {' and '.join(map(str, shapes[:2]))} are mixed")
        _refuse(self.codes.parent, bad)
        codes, labels = np.stack([codes for codes, _ in read]), np.array([label for _, label in read], np.int32)
        first = block * self.block_images
        return Part(np.arange(first, first + len(read)), {"codes": codes, "labels": labels}, [])

    def _read(self, image: int) -> tuple[Array, int] | str:
        codes = _load(self.codes / f"{image}.npy")
        labels = _load(self.labels / f"{image}.npy")
        for array in (codes, labels):
            if isinstance(array, str):
                return array
        assert not isinstance(codes, str)
        assert not isinstance(labels, str)
        if codes.ndim != 3 or codes.shape[0] != 1 or codes.dtype.kind not in "iu":
            return f"{self.codes / f'{image}.npy'}: is {codes.dtype} {codes.shape}, not (1, views, tokens) integers"
        if codes.size == 0 or int(codes.min()) < 0 or int(codes.max()) > 65535:
            return f"{self.codes / f'{image}.npy'}: codes must lie in 0..65535"
        if labels.size != 1 or labels.dtype.kind not in "iu" or int(labels.flat[0]) < 0:
            return f"{self.labels / f'{image}.npy'}: is {labels.dtype} {labels.shape}, not one label"
        return codes[0].astype(np.uint16), int(labels.flat[0])


def import_llamagen(request: Import) -> TokenManifest:
    """Read the folders, refuse holes and copies, write a store; resumable.  Returns its manifest; raises UserError."""
    options = request.options
    with full_disks_in_one_line(options.out):
        _import(request)
    tidy(options.out)
    return read_manifest(options.out, TokenManifest)


def _import(request: Import) -> None:
    options = request.options
    codes, labels = _folders(request.folder)
    if request.folder.name.endswith("_105") and options.geometry.crop_range == CROP_RANGE:
        named = f"its name is that of LlamaGen's crop range 1.05, --crop-range is {CROP_RANGE:g}"
        LOG.warning("%s: %s: Mirai-I would be shown other pixels than the codes are of", request.folder, named)
    facts, settings = _facts(request)
    # Decided last: what was read before the copies were refused need not be read again.
    policy = {"drop_padding": str(request.drop_padding), "keep_duplicates": str(request.keep_duplicates)}
    out, source = options.out, str(request.folder.resolve())
    if (out / MANIFEST).is_file():
        made = read_manifest(out, TokenManifest)
        check_same(out, WorkPlan("llamagen", "", made.made_with, 0, 0, []), "llamagen", None, settings | policy)
        return
    plan = read_plan(out)
    if plan is None:
        count = _count(codes, labels)
        block = options.block or automatic_block(count, LARGEST_BLOCK["images"])
        plan = WorkPlan("llamagen", source, settings, block, count, [])
        begin(out, plan, Listing([str(i) for i in range(count)], np.zeros(count, np.int32)))
    check_same(out, plan, "llamagen", source, settings)
    job, progress = ImportJob(codes, labels, plan.block_images, options.workers), WorkProgress(plan, out, speaks=True)
    try:
        run_blocks(job, plan, out, 0, 1, True, progress.tell)
        drop, all_labels = _copies(job, plan, request, facts)
        listing, classes = _listing(request, all_labels, drop)
        if request.tokenizer is not None:
            keep_codebook(request.tokenizer, out)
        plan = replace(plan, classes=classes, settings=settings | policy)
        assemble(job, plan, out, listing, options.geometry, facts, frozenset(drop))
    finally:
        progress.close()
        job.reader.shutdown(wait=False, cancel_futures=True)


def _folders(folder: Path) -> tuple[Path, Path]:
    """The `*_codes` and `*_labels` folders that LlamaGen's extraction writes."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    folders = []
    for ending in ("_codes", "_labels"):
        shown = (path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
        matches = sorted(path for path in shown if path.name.endswith(ending))
        if len(matches) != 1:
            names = ", ".join(path.name for path in matches) or "none"
            raise UserError(
                f"{folder}: must hold one folder named ...{ending}, as LlamaGen's extraction writes; {names}"
            )
        folders.append(matches[0])
    return folders[0], folders[1]


def _facts(request: Import) -> tuple[TokenizerFacts, dict[str, str]]:
    facts = TokenizerFacts(name="unknown", digest="unknown", vocab_size=DEFAULT_VOCABULARY)
    if request.tokenizer is not None:
        tokenizer = open_tokenizer(request.tokenizer)
        facts = TokenizerFacts(name=tokenizer.name, digest=tokenizer.digest, vocab_size=tokenizer.vocab_size)
    settings = {name: str(value) for name, value in request.options.geometry.model_dump().items()}
    settings |= {
        "from": "LlamaGen's .npy files", "block": str(request.options.block or "auto"), "tokenizer": facts.name,
        "tokenizer_digest": facts.digest,
    }  # fmt: skip
    return facts, settings


def _count(codes: Path, labels: Path) -> int:
    """Images, numbered 0..n-1 in both folders without holes; else raises UserError with a list."""
    bad: list[str] = []
    numbers: list[set[int]] = []
    for folder in (codes, labels):
        seen: dict[int, str] = {}
        names = sorted(os.listdir(folder))
        hidden = [name for name in names if is_hidden(name)]
        if hidden:
            LOG.warning("%s: left out %d hidden or system names, e.g. %s", folder, len(hidden), hidden[0])
        for name in names:
            if is_hidden(name):
                continue
            stem = name.removesuffix(".npy")
            if stem == name or not stem.isdecimal():
                bad.append(f"{folder / name}: is not called <number>.npy")
            elif int(stem) in seen:
                bad.append(f"{folder / name}: the same image as {seen[int(stem)]}")
            else:
                seen[int(stem)] = name
                if name != f"{int(stem)}.npy":
                    bad.append(f"{folder / name}: must be called {int(stem)}.npy")
        numbers.append(set(seen))
    if not numbers[0]:
        raise UserError(f"{codes}: holds no <number>.npy files")
    count = max(numbers[0] | numbers[1]) + 1
    for folder, there in zip((codes, labels), numbers, strict=True):
        bad += [f"{folder}: {span} missing" for span in spans(sorted(set(range(count)) - there))]
    _refuse(codes.parent, bad)
    return count


def spans(numbers: list[int]) -> list[str]:
    """[1, 2, 3, 7] -> ["1.npy to 3.npy are", "7.npy is"]."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return [f"{a}.npy is" if a == b else f"{a}.npy to {b}.npy are" for a, b in runs]


def _copies(job: ImportJob, plan: WorkPlan, request: Import, facts: TokenizerFacts) -> tuple[list[int], Array]:
    """Images to leave out, and the labels (n,) of all; raises UserError for copies nobody has decided about and for
    codes that the tokenizer does not have."""
    digests: list[bytes] = []
    labels: list[Array] = []
    shapes, largest = set(), 0
    for block in range(plan.blocks):
        part = load_or_redo_shard(job, plan, request.options.out, block)
        labels.append(part.arrays["labels"])
        shapes.add(part.arrays["codes"].shape[1:])
        largest = max(largest, int(part.arrays["codes"].max()))
        digests += [hashlib.sha1(row.tobytes(), usedforsecurity=False).digest() for row in part.arrays["codes"]]
    views, tokens = _one_shape(shapes, request)
    _check_geometry(request, views, tokens)
    if request.tokenizer is not None and largest >= facts.vocab_size:
        problem = f"has {facts.vocab_size} codes, the files' go up to {largest}: it is not the one that was used"
        raise UserError(f"--tokenizer {request.tokenizer}: {problem}")
    padding = _padding(digests)
    bad = []
    if padding and not request.drop_padding and not request.keep_duplicates:
        first = len(digests) - padding
        bad.append(
            f"images {first} to {len(digests) - 1} are copies of images 0 to {padding - 1}: padding of the "
            "sampler that extracted them; --drop-padding leaves them out"
        )
    whole = len(digests) - padding if request.drop_padding else len(digests)
    seen: dict[bytes, int] = {}
    for image, digest in enumerate(digests[: len(digests) - padding]):
        if digest in seen and not request.keep_duplicates:
            bad.append(f"image {image} has the codes of image {seen[digest]}; --keep-duplicates allows it")
        seen.setdefault(digest, image)
    _refuse(request.folder, bad)
    return list(range(whole, len(digests))), np.concatenate(labels)


def _padding(digests: list[bytes]) -> int:
    """The largest k < n/2 such that the last k images are the first k, in order."""
    for k in range((len(digests) - 1) // 2, 0, -1):
        if digests[-1] == digests[k - 1] and digests[-k:] == digests[:k]:
            return k
    return 0


def _one_shape(shapes: set[tuple[int, ...]], request: Import) -> tuple[int, int]:
    if len(shapes) > 1:
        raise UserError(f"{request.folder}: files of different shapes are mixed: {sorted(shapes)}")
    views, tokens = shapes.pop()
    return views, tokens


def _check_geometry(request: Import, views: int, tokens: int) -> None:
    geometry = request.options.geometry.views
    if geometry.num_views != views:
        raise UserError(f"--crops {geometry.crops}: means {geometry.num_views} views, the files have {views}")
    side = round(tokens**0.5)
    if side * side != tokens or geometry.image_size % side:
        raise UserError(f"--size {geometry.image_size}: does not fit the files' {tokens} tokens an image")


def _listing(request: Import, labels: Array, drop: list[int]) -> tuple[Listing, list[str]]:
    """Names and classes: of `--images` where given, else numbers."""
    count = len(labels) - len(drop)
    if request.images is None:
        classes = [str(label) for label in range(int(labels.max()) + 1)]
        return Listing([str(image) for image in range(len(labels))], labels), classes
    image_set = open_image_set(request.images)
    if not isinstance(image_set, FolderImages) or len(image_set.names) != count:
        raise UserError(f"--images {request.images}: has {len(image_set.names)} images, the codes are of {count}")
    wrong = np.flatnonzero(image_set.labels != labels[:count])
    if len(wrong):
        place = int(wrong[0])
        name, label = image_set.names[place], image_set.labels[place]
        raise UserError(
            f"--images {request.images}: image {place}, {name}, has class {label}, its codes have label "
            f"{labels[place]}: not the folder that was extracted"
        )
    return Listing(image_set.names, image_set.labels), image_set.classes


# NumPy parses a file's header as Python, and parsers of two threads count their depth in one place (CPython issue
# 106905): now and then a file that is whole would be "AST constructor recursion depth mismatch".
_ONE_HEADER = threading.Lock()


def _load(path: Path) -> Array | str:
    try:
        with _ONE_HEADER:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(array, np.ndarray):
            array = np.array(array)  # read here, several files at once
    except Exception as error:  # bytes from anywhere: NumPy's header parser raises nearly any type on them
        return f"{path}: cannot be read ({(str(error).splitlines() or [type(error).__name__])[0]})"
    return array if isinstance(array, np.ndarray) else f"{path}: is not one array"


def _refuse(folder: Path, bad: list[str]) -> None:
    if not bad:
        return
    more = [f"... and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
    lines = "\n  ".join(bad[:SHOWN] + more)
    raise UserError(f"{folder}: cannot be imported:\n  {lines}")
