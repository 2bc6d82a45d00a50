"""Drawing an archive: a plan, blocks on every rank, then on rank 0 the files.  Ranks meet in a folder, as those of an
extraction do, so that any of them may die at any instant and the same command goes on, on any number of ranks.
"""

from __future__ import annotations

import glob
import io
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mirai_ds.config import UserError
from mirai_ds.config.errors import shown
from mirai_ds.data.meaning import Meaning, class_names
from mirai_ds.resumable.parts import heartbeat, load_or_redo_shard, run_blocks, wait_for_parts
from mirai_ds.resumable.plan import PARTS, PLAN, WorkPlan, read_plan
from mirai_ds.resumable.progress import WorkProgress
from mirai_ds.runtime.disk import left_behind, write_whole
from mirai_ds.runtime.distributed import World, local_device
from mirai_ds.sampling.archive import write_sample_archive
from mirai_ds.sampling.job import DrawJob
from mirai_ds.sampling.request import SamplingRequest, bytes_needed, prepare
from mirai_ds.tracking.pictures import labelled_grid

Array = np.ndarray[Any, Any]

KIND = "samples"
PLAN_SECONDS = 600.0  # rank 0 loads weights meanwhile, as all do
SHEET = 100  # images on the contact sheet


class Files:
    """What lies where, for `--out x.npz`: x.npz.json (the record), x.tokens.npz, x.sheet.png, x/ (PNGs); x.npz.work/
    while it is unfinished."""

    def __init__(self, out: Path) -> None:
        self.archive = out
        self.record = out.with_name(f"{out.name}.json")
        self.tokens = out.with_name(f"{out.stem}.tokens.npz")
        self.sheet = out.with_name(f"{out.stem}.sheet.png")
        self.pictures = out.with_name(out.stem)
        self.work = out.with_name(f"{out.name}.work")
        self.written = (self.archive, self.tokens, self.sheet, self.record)


def draw_archive(request: SamplingRequest, world: World) -> str | None:
    """Draw what is asked for.  Call it on every rank with the same request.

    Rank 0 returns a line that says what was done, the others None when their own blocks are.  Raises UserError.
    """
    device = local_device(world)
    drawing = prepare(request, device)
    files = Files(drawing.out)
    plan = WorkPlan(KIND, str(request.source), drawing.settings, drawing.batch, request.num, [])
    with troubles_in_one_line(files):
        begun = _agree(files, plan, world, bytes_needed(drawing, request.num), drawing.in_any_company)
        if begun is not None:
            job = DrawJob(request, drawing, begun, device, files.pictures)
            _work(job, files, begun, request, world)
        if world.rank != 0:
            return None
        _tidy(files)
    origin = f"{request.source} ({drawing.protocol['weights']} weights)"
    return f"{files.archive}: {request.num} images of {drawing.size} pixels from {origin}; {files.record.name}"


def _work(job: DrawJob, files: Files, plan: WorkPlan, request: SamplingRequest, world: World) -> None:
    progress = WorkProgress(plan, files.work, speaks=world.rank == 0)
    try:
        with heartbeat(files.work, world.rank):
            run_blocks(job, plan, files.work, world.rank, world.size, False, progress.tell)
        if world.rank == 0:
            wait_for_parts(files.work, plan, request.stall_timeout, progress.tell)
            progress.close()
            _assemble(job, files, plan)
    finally:
        progress.close()


def _agree(files: Files, plan: WorkPlan, world: World, needed: int, any_batch: bool) -> WorkPlan | None:
    """The plan to work by, which rank 0 fixes and all check; None when all is done.  any_batch: it may be of another
    batch.  Raises UserError where it cannot be."""
    if world.rank == 0 and not files.record.is_file() and read_plan(files.work) is None:
        _begin(files, plan, needed)
    end = time.monotonic() + PLAN_SECONDS
    while True:
        if files.record.is_file():
            _check_same(files, json.loads(files.record.read_text(encoding="utf-8")), plan, True, any_batch)
            if not files.archive.is_file():
                raise UserError(f"{files.record}: is there without {files.archive.name}; remove it to draw again")
            return None
        begun = read_plan(files.work)
        if begun is not None:
            _check_same(files, record_of(begun), plan, False, any_batch)
            return begun
        if time.monotonic() > end:
            raise UserError(f"--out {files.archive}: rank 0 made no plan within {PLAN_SECONDS:.0f} s; see its messages")
        time.sleep(0.1)


def _begin(files: Files, plan: WorkPlan, needed: int) -> None:
    for path in files.written:
        if path.exists():
            raise UserError(f"{path}: is in the way and not this command's; remove it or give another --out")
    (files.work / PARTS).mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(files.work).free
    if free < needed:
        raise UserError(f"--out {files.archive}: needs {needed / 1e9:.2f} GB meanwhile, {free / 1e9:.2f} are free")
    write_whole(files.work / PLAN, (json.dumps(asdict(plan), indent=1, ensure_ascii=False) + "\n").encode())


def record_of(plan: WorkPlan) -> dict[str, Any]:
    """The protocol as the record states it."""
    return {"source": plan.source, **{name: json.loads(text) for name, text in plan.settings.items()}}


def _check_same(files: Files, before: dict[str, Any], plan: WorkPlan, finished: bool, any_batch: bool) -> None:
    """Raises UserError naming the first setting that differs.  The source may have moved: its digest counts."""
    now = record_of(plan)
    for name in plan.settings:
        if before.get(name) != now[name] and not (any_batch and name == "batch"):
            state = "was drawn" if finished else "was begun"
            instead = "give another --out" if finished else f"go on with the same, or remove {files.work}"
            why = "on this device and at this precision some draws depend on it: " if name == "batch" else ""
            raise UserError(
                f"--out {files.archive}: {state} with {name} = {shown(before.get(name))}, this is {shown(now[name])}; "
                f"{why}{instead}"
            )


def _assemble(job: DrawJob, files: Files, plan: WorkPlan) -> None:
    """Parts into the files that stay; the record comes last.  A batch is in memory at a time, and all tokens."""
    labels: list[Array] = []
    tokens: list[Array] = []
    first: list[Array] = []

    def batches() -> Iterator[Array]:
        for block in range(plan.blocks):
            part = load_or_redo_shard(job, plan, files.work, block, whole=job.whole)
            labels.append(part.arrays["labels"])
            tokens.append(part.arrays["tokens"])
            if block * plan.block_images < SHEET:
                first.append(part.arrays["images"])
            yield part.arrays["images"]

    size = job.drawing.size
    digest = write_sample_archive(files.archive, batches(), (plan.num_images, size, size, 3))
    images = np.concatenate(first)[:SHEET]
    _write(files, np.concatenate(labels), np.concatenate(tokens), images, job.drawing.meaning)
    record = {**record_of(plan), "samples_sha256": digest}
    write_whole(files.record, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())


def _write(files: Files, labels: Array, tokens: Array, first: Array, meaning: Meaning | None) -> None:
    from PIL import Image

    data = io.BytesIO()
    np.savez(data, labels=labels, tokens=tokens)
    write_whole(files.tokens, data.getvalue())
    picture = io.BytesIO()
    sheet = labelled_grid(first, columns=10, captions=class_names(meaning, labels[: len(first)]))
    Image.fromarray(sheet).save(picture, format="PNG")
    write_whole(files.sheet, picture.getvalue())


def _tidy(files: Files) -> None:
    """Remove what only unfinished samples need, and files that a kill left half written."""
    shutil.rmtree(files.work, ignore_errors=True)
    written = [path.with_name(glob.escape(path.name)) for path in (*files.written, files.archive)]
    for pattern in [*written, files.pictures / "*.png"]:
        for path in left_behind(pattern):
            path.unlink(missing_ok=True)


@contextmanager
def troubles_in_one_line(files: Files) -> Iterator[None]:
    """A file that cannot be written is the user's to mend; what is finished stays."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and files.record.is_file():
            return  # another start of the same command was faster and has tidied up
        problem = f"cannot be written ({error.strerror or error}); fix this and rerun the same command to resume"
        raise UserError(f"--out {files.archive}: {problem}") from None
