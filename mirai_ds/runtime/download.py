"""Files from the network: gone on with where they were cut, compared with their digest, whole or not there."""

from __future__ import annotations

import http.client
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from mirai_ds.config.errors import UserError
from mirai_ds.runtime.disk import digest_of_file, sync
from mirai_ds.runtime.published_files import PublishedFile

CHUNK = 1 << 20
TIMEOUT_SECONDS = 30.0
PAUSE_SECONDS = 1.0
TRIES = 5  # in a row that bring nothing

Told = Callable[[int, int | None], None]  # bytes that are here, and of how many where that is known


class NoNetworkError(UserError):
    """The server cannot be reached from this machine: the file must be brought."""


def fetch(file: PublishedFile, folder: Path, told: Told = lambda here, total: None) -> tuple[Path, str, bool]:
    """`file` in `folder`: its path, its sha256, and whether it was there before.

    What has come lies in `.NAME.part` until it is whole; the next call goes on from there.  Raises NoNetworkError where
    no connection can be made, UserError for a file of that name that is another, a digest or size that is wrong, a
    connection that is cut again and again, and what the disk refuses.
    """
    from filelock import FileLock, Timeout

    path, part = folder / file.name, folder / f".{file.name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            return path, _checked(file, path, "is there, and move it away to fetch it anew:"), True
        with FileLock(folder / f".{file.name}.lock", timeout=0):
            _download(file, part, told)
            try:
                digest = _checked(file, part, "what came")
            except UserError:
                part.unlink()
                raise
            sync(part)
            part.rename(path)
            sync(folder)
    except Timeout:
        raise UserError(f"{path}: another process is fetching it; wait for that one") from None
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}; choose another folder (--to)") from None
    return path, digest, False


def _checked(file: PublishedFile, path: Path, what: str) -> str:
    """The sha256 of the file in `path`.  Raises UserError where it is not what is published."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        raise UserError(f"{path}: {what} has {size:,} bytes, {file.url} has {file.size:,}")
    digest = digest_of_file(path)
    if file.sha256 is not None and digest != file.sha256:
        raise UserError(f"{path}: {what} has sha256 {digest}, published is {file.sha256}")
    return digest


def _download(file: PublishedFile, part: Path, told: Told) -> None:
    """Bring `part` to its end; each connection goes on where the one before was cut."""
    fruitless, reached = 0, False
    while fruitless < TRIES:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _receive(file, part, before, told):
                return
            reached = True
        except urllib.error.HTTPError as error:
            error.close()
            raise UserError(f"{file.url}: the server answers {error.code} {error.reason}") from None
        except urllib.error.URLError as error:  # no connection at all
            if not reached:
                raise NoNetworkError(f"{file.url}: cannot be reached ({error.reason})") from None
        except (http.client.HTTPException, ConnectionError, TimeoutError):
            reached = True
        now = part.stat().st_size if part.exists() else 0
        fruitless = 0 if now > before else fruitless + 1
        time.sleep(PAUSE_SECONDS * fruitless)
    raise UserError(
        f"{file.url}: the connection was cut {TRIES} times in a row, {part.stat().st_size if part.exists() else 0:,} "
        "bytes are here; give the same command again, it goes on from there"
    )


def _receive(file: PublishedFile, part: Path, here: int, told: Told) -> bool:
    """One connection; whether the file is whole now.  `here` bytes are in `part`."""
    request = urllib.request.Request(file.url, headers={"User-Agent": "mirai-ds", "Accept-Encoding": "identity"})
    if here:
        request.add_header("Range", f"bytes={here}-")
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing after what is here: it was whole, or is another file's
            raise
        whole = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        error.close()
        if whole is not None and int(whole[1]) == here:
            return True
        part.unlink()
        return False
    with answer:
        going_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {here}-")
        here = here if going_on else 0
        length = answer.headers.get("Content-Length")
        total = here + int(length) if length is not None else None
        with part.open("ab" if going_on else "wb") as writing:
            while chunk := answer.read(CHUNK):
                writing.write(chunk)
                here += len(chunk)
                told(here, total)
        return total is None or here == total
