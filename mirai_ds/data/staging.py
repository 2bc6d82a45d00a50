"""Copies of stores on a node's own disk: whole or not there, checked by the store's digests, shared by all runs.

STAGE/mirai_ds-<seal>/                 a whole copy; never changed, never removed by this package
STAGE/.mirai_ds-<seal>.<host>-....tmp/ one that is being made, or was left by a process that was killed
STAGE/.mirai_ds-<seal>.lock            held by whoever makes it; the system frees it when that process dies
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mirai_ds.config import UserError
from mirai_ds.data.stores import IMAGE_FORMAT, ImageStore, TokenStore, open_image_store, open_token_store, store_format
from mirai_ds.runtime.disk import left_behind, sync, temporary_name

CHUNK = 1 << 23  # bytes copied between two words of progress
SPARE = 1 << 26  # bytes that stay free on the node's disk
_WAIT_SECONDS = 0.5


def stage_folder(stage: str) -> Path:
    """`data.stage` on this node, its variables filled in.  Raises UserError where one is not set here."""
    folder = os.path.expandvars(stage)
    if "$" in folder or not os.path.isabs(folder):
        what = "a variable in it is not set" if "$" in folder else f"it is {folder!r}, no whole path,"
        raise UserError(f"data.stage = {stage!r}: {what} on {socket.gethostname()}; give a folder that every node has")
    return Path(folder)


def open_any(path: Path) -> TokenStore | ImageStore:
    """The store in `path`, whichever kind it is.  Raises UserError."""
    return open_image_store(path) if store_format(path) == IMAGE_FORMAT else open_token_store(path)


def place_of(store: TokenStore | ImageStore, folder: Path) -> Path:
    """Where the copy of a store lies: by its content, so that runs that read the same store share it."""
    return folder / f"mirai_ds-{store.manifest.seal[:32]}"


def stage_store(path: Path, folder: Path, told: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """The whole, checked copy below `folder` of the store in `path`, made now unless it is there.

    told: hears of bytes copied and then compared, and of all to be; where another process copies, of the other's.
    Raises UserError for a damaged store or copy, a folder that cannot be written and a disk without enough room.
    """
    store = open_any(path)
    place = place_of(store, folder)
    with _said_in_a_line(folder):
        if _is_whole(place, store):
            return place
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(place, told, sum((path / name).stat().st_size for name in store.files())):
            if not _is_whole(place, store):
                _copy(store, place, told)
    return place


def _is_whole(place: Path, store: TokenStore | ImageStore) -> bool:
    """Whether the copy is there.  It appears by a rename, so what is there and does not open was damaged since."""
    if not place.exists():
        return False
    try:
        found = open_any(place)
        problem = None if found.manifest.seal == store.manifest.seal else "is the copy of another store"
    except UserError as error:
        problem = str(error)
    if problem is not None:
        raise UserError(
            f"data.stage: the copy in {place} is damaged ({problem}); remove it, the next start copies anew"
        )
    return True


def _copy(store: TokenStore | ImageStore, place: Path, told: Callable[[int, int], None]) -> None:
    """Copy the files aside, compare every digest, and let the copy appear.  The caller holds the lock."""
    temporary = temporary_name(place)
    for left in left_behind(place):
        if left.name.startswith(f".{place.name}.{socket.gethostname()}-"):  # the lock says that its process is gone
            shutil.rmtree(left, ignore_errors=True)
    sizes = {name: (store.path / name).stat().st_size for name in store.files()}
    total, free = sum(sizes.values()), shutil.disk_usage(place.parent).free
    needed = total + SPARE
    if free < needed:
        raise UserError(
            f"data.stage: {place.parent} on {socket.gethostname()} has {free / 1e9:.2f} GB free, {store.path} needs "
            f"{needed / 1e9:.2f}; make room, or leave data.stage out"
        )
    temporary.mkdir()
    try:
        done = 0
        for name in sizes:
            done = _copy_file(store.path / name, temporary / name, done, lambda copied: told(copied, 2 * total))
        copy = open_any(temporary)
        parts = len(copy.manifest.shard_bytes) if isinstance(copy, ImageStore) else copy.manifest.num_images
        damages = copy.damages(lambda part: told(total + total * part // parts, 2 * total))
        if damages:
            raise UserError(f"data.stage: {store.path} was not copied whole: {damages[0]}")
        try:
            temporary.rename(place)
        except OSError:  # the folder is shared after all, and another node was first
            if not place.exists():
                raise
        sync(place.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_file(source: Path, target: Path, done: int, told: Callable[[int], None]) -> int:
    """Copy one file and flush it; `done` bytes were copied before, the answer is those with it."""
    with source.open("rb") as reading, target.open("xb") as writing:
        while chunk := reading.read(CHUNK):
            writing.write(chunk)
            done += len(chunk)
            told(done)
        writing.flush()
        os.fsync(writing.fileno())
    return done


@contextmanager
def _alone(place: Path, told: Callable[[int, int], None], total: int) -> Iterator[None]:
    """Hold the lock on `place`.  While another process has it, its bytes are this one's progress."""
    from filelock import FileLock, Timeout

    lock = FileLock(place.with_name(f".{place.name}.lock"))
    while True:
        try:
            lock.acquire(timeout=_WAIT_SECONDS)
            break
        except Timeout:
            others = [file for left in left_behind(place) for file in left.glob("*")]
            told(sum(file.stat().st_size for file in others if file.exists()), 2 * total)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _said_in_a_line(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        raise UserError(
            f"data.stage = {str(folder)!r}: {where} on {socket.gethostname()}: {error.strerror}; give a folder on the "
            "node's own disk that can be written, or leave data.stage out"
        ) from None
