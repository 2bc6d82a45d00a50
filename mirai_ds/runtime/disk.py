"""What makes a file on disk certain: it is whole or not there, flushed from the machine's buffers, and has a digest."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def digest_of_file(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the renames in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_name(path: Path) -> Path:
    """A name in the folder of `path` that no other process or thread uses, on any node."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}.tmp")


def left_behind(path: Path) -> list[Path]:
    """Temporary files of `path` that killed processes left; `path.name` may be a pattern of `glob`."""
    return sorted(path.parent.glob(f".{path.name}.*.tmp"))


@contextmanager
def replacing(path: Path, flush: bool = True) -> Iterator[Path]:
    """Write `path` whole or not at all: the block writes the file whose name it is given, in the same folder.

    When the block ends, that file is flushed to disk and renamed to `path`, and the folder is flushed: a process or a
    machine that dies at any instant leaves the old file or the new one.  When the block raises, the old file stays and
    the new one is removed.  flush False: certain against a killed process only, for many files that can be made again.
    Raises OSError as the system does.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        if flush:
            sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if flush:
        sync(path.parent)


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write a .npz of named arrays, whole or not at all (see `replacing`)."""
    import numpy as np  # here: the command line starts without it

    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def write_whole(path: Path, data: bytes | str) -> None:
    """Write bytes, or text as UTF-8, whole or not at all (see `replacing`)."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
