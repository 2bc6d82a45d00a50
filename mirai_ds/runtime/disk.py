"""What makes a file on disk certain: its digest, and that it has left the machine's buffers."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def digest_of_file(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            found.update(chunk)
    return found.hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the renames in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
