"""A run's checkpoints one by one: what each is, whether it is whole, and where a resume would begin."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mirai_ds.checkpoint import store
from mirai_ds.checkpoint.store import INFO, MANIFEST, POINTER
from mirai_ds.config import UserError
from mirai_ds.runs.records import Json, read_json, size_text


@dataclass(frozen=True)
class Checkpoint:
    """damage: why it is not whole, empty when it is.  abandoned: why a resume passes over a whole one."""

    step: int
    path: Path
    size: int
    written: float | None  # unix time
    info: Json
    damage: str
    abandoned: str = ""

    @property
    def layout(self) -> str:
        """Who wrote it: ranks x ZeRO stage."""
        return f"{self.info.get('world_size', '?')} x ZeRO-{self.info.get('zero_stage', '?')}"


@dataclass(frozen=True)
class Resume:
    """Where `--resume auto` would begin: step and folder, or why nowhere; and what it would pass over."""

    step: int | None
    reason: str
    skipped: tuple[str, ...]


def read_checkpoints(run: Path, digests: bool, valid: dict[int, float]) -> list[Checkpoint]:
    """All finished checkpoints, oldest first; with `digests` every byte is read, and progress shown on a terminal.

    valid: start -> last step of it that the run builds upon; empty where that is not known.
    """
    folders = {step: store.folder_of(run, step) for step in store.list_steps(run)}
    sizes = {step: folder_size(folder) for step, folder in folders.items()}
    if not digests:
        return _present([_read(step, folder, sizes[step], False, valid) for step, folder in folders.items()])
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from mirai_ds.runtime.time_left import TimeLeft

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeLeft(0))
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=sum(sizes.values()))
        checkpoints = []
        for step, folder in folders.items():
            bar.update(task, description=f"reading {folder.name}")
            checkpoints.append(_read(step, folder, sizes[step], True, valid))
            bar.advance(task, sizes[step])
    return _present(checkpoints)


def _present(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints without those that a living run has removed while they were read."""
    return [one for one in checkpoints if one.path.is_dir()]


def _read(step: int, folder: Path, size: int, digests: bool, valid: dict[int, float]) -> Checkpoint:
    damage = abandoned = ""
    info: Json = {}
    try:
        info = asdict(store.verify(folder) if digests else store.check_sizes(folder))
    except UserError as error:
        damage = str(error)
    written = None
    for name in (MANIFEST, ""):
        with suppress(OSError):
            written = (folder / name).stat().st_mtime
            break
    info = info or read_json(folder / INFO) or {}
    if not damage and not store.is_valid(store.info_of(info), valid):
        abandoned = store.ignored_because(folder, info["incarnation"])
    return Checkpoint(step, folder, size, written, info, damage, abandoned)


def resume_point(checkpoints: Sequence[Checkpoint]) -> Resume:
    """What `store.find(run, "auto")` would answer, without reading anything again."""
    skipped: list[str] = []
    for one in reversed(checkpoints):
        if not one.damage and not one.abandoned:
            return Resume(one.step, "", tuple(skipped))
        skipped.append(one.damage or one.abandoned)
    reason = f"none of {len(skipped)} checkpoints is whole" if skipped else "there is no checkpoint"
    return Resume(None, reason, tuple(skipped))


def read_pointer(run: Path) -> tuple[str | None, str]:
    """What checkpoints/latest names, and what is wrong with it.  A resume does not need it; other tools may."""
    try:
        name = (run / "checkpoints" / POINTER).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None, "checkpoints/latest is missing" if store.list_steps(run) else ""
    if not name or not (run / "checkpoints" / name).is_dir():
        return name, f"checkpoints/latest names {name!r}, which is not there"
    newest = store.list_steps(run)[-1:]
    if newest and store.folder_of(run, newest[0]).name != name:
        return name, f"checkpoints/latest names {name!r}, not the newest checkpoint"
    return name, ""


def leftovers(run: Path) -> list[str]:
    """What lies beside the checkpoints and is none, with what it is and its size."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    whole = {store.folder_of(run, step).name for step in store.list_steps(run)}
    return [
        f"{path.name} ({_what(path.name)}, {size_text(folder_size(path))})"
        for path in sorted(folder.iterdir())
        if path.name != "latest" and path.name not in whole
    ]


def _what(name: str) -> str:
    if ".partial" in name:
        return "a save that did not finish, or is being written"
    if ".replaced" in name or ".deleted" in name:
        return "a checkpoint that was being removed"
    return "a pointer that was being written" if name == "latest.new" else "unknown"


def folder_size(path: Path) -> int:
    """Bytes of all files in a folder, or of a file.  What vanishes meanwhile counts nothing: the run may be alive."""
    total = 0
    paths = [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
    for one in paths:
        with suppress(OSError):
            if not one.is_dir():
                total += one.lstat().st_size
    return total
