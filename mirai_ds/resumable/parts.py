"""Blocks of images, each finished whole or not at all: a file appears under its name only when it is complete."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mirai_ds.config import UserError
from mirai_ds.data.stores.files import MANIFEST
from mirai_ds.resumable.plan import PARTS, WorkPlan
from mirai_ds.runtime.disk import write_whole

Array = np.ndarray[Any, Any]

BEAT_SECONDS = 5.0


class Problem(NamedTuple):
    """What a user must know of an image; kept: whether it is in the store all the same."""

    image: int
    name: str
    kept: bool
    reason: str


class Part(NamedTuple):
    """A finished block: numbers of its images that are kept, their arrays, its problems."""

    kept: Array
    arrays: dict[str, Array]
    problems: list[Problem]


class ShardJob(Protocol):
    """What is done with a block.  A function of the block alone: not of ranks, workers or restarts."""

    def prepare(self, images: range) -> Any:
        """Begin reading; must not block."""
        ...

    def finish(self, prepared: Any, block: int) -> Part:
        """The rest; files of its own are written aside and renamed before it returns."""
        ...


def part_file(folder: Path, block: int) -> Path:
    """Where a finished block lies."""
    return folder / PARTS / f"{block:06d}.npz"


def write_part(path: Path, part: Part) -> None:
    """Write a part whole or not at all."""
    problems = np.frombuffer(json.dumps(part.problems).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, kept=part.kept, problems=problems, **part.arrays)  # type: ignore[arg-type]
    write_whole(path, buffer.getvalue())


def read_part(path: Path, arrays: bool = True) -> Part | None:
    """A part, with its arrays or without; None when it is damaged, e.g. by a crash of the whole machine."""
    try:
        with np.load(path, allow_pickle=False) as data:
            problems = [Problem(*entry) for entry in json.loads(data["problems"].tobytes())]
            names = [name for name in data.files if name not in ("kept", "problems")] if arrays else []
            return Part(data["kept"], {name: data[name] for name in names}, problems)
    except FileNotFoundError:
        raise
    except Exception:  # bytes from anywhere: NumPy raises nearly any type on them
        return None


def missing_blocks(folder: Path, plan: WorkPlan) -> list[int]:
    """Blocks without a finished part."""
    there = {name for name in os.listdir(folder / PARTS) if name.endswith(".npz")}
    return [block for block in range(plan.blocks) if part_file(folder, block).name not in there]


def run_blocks(
    job: ShardJob, plan: WorkPlan, folder: Path, rank: int, world: int, strict: bool, tell: Callable[[], None]
) -> None:
    """Do this rank's missing blocks: block b belongs to rank b % world.  The next block is read while one is worked on.

    Raises UserError for the first image that cannot be read when `strict`.
    """
    mine = [block for block in missing_blocks(folder, plan) if block % world == rank]
    ahead = job.prepare(plan.images_of(mine[0])) if mine else None
    for place, here in enumerate(mine):
        prepared = ahead
        if place + 1 < len(mine):
            ahead = job.prepare(plan.images_of(mine[place + 1]))
        part = job.finish(prepared, here)
        lost = next((problem for problem in part.problems if not problem.kept), None)
        if strict and lost is not None:
            raise UserError(f"{Path(plan.source) / lost.name}: {lost.reason} (--strict)")
        write_part(part_file(folder, here), part)
        tell()


def load_or_redo_shard(
    job: ShardJob,
    plan: WorkPlan,
    folder: Path,
    block: int,
    arrays: bool = True,
    whole: Callable[[Part], bool] = lambda _: True,
) -> Part:
    """Reads a finished part; does it anew where it is damaged or not `whole`."""
    path = part_file(folder, block)
    part = read_part(path, arrays)
    if part is None or not whole(part):
        part = job.finish(job.prepare(plan.images_of(block)), block)
        write_part(path, part)
    return part


@contextmanager
def heartbeat(folder: Path, rank: int) -> Iterator[None]:
    """Touch this rank's file every few seconds: a block may take an hour, a dead rank should be noticed sooner."""
    path, over = folder / PARTS / f"rank-{rank}.alive", threading.Event()

    def beat() -> None:
        while True:
            with suppress(OSError):  # the folder is gone: another start of the same command has finished
                path.touch()
            if over.wait(BEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def wait_for_parts(folder: Path, plan: WorkPlan, stall_timeout: float, tell: Callable[[], None]) -> None:
    """Wait for the blocks of other ranks.  Raises UserError when none has a heartbeat for `stall_timeout` seconds."""
    beats, since = _heartbeats_of_others(folder), time.monotonic()
    while (missing := missing_blocks(folder, plan)) and not (folder / MANIFEST).is_file():
        if time.monotonic() - since > stall_timeout:
            raise UserError(
                f"--out {folder}: {len(missing)} of {plan.blocks} blocks are missing and nobody has worked on them for "
                f"{stall_timeout:.0f} seconds; give the same command again to go on"
            )
        time.sleep(0.5)
        tell()
        now = _heartbeats_of_others(folder)
        if now != beats:
            beats, since = now, time.monotonic()


def _heartbeats_of_others(folder: Path) -> dict[str, float]:
    """When each rank but 0 last touched its file: only changes mean anything, clocks of machines differ."""
    touched = {}
    for path in (folder / PARTS).glob("rank-*.alive"):
        with suppress(FileNotFoundError):
            touched[path.name] = path.stat().st_mtime
    touched.pop("rank-0.alive", None)
    return touched
