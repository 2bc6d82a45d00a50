"""Stores on the nodes' own disks before a run reads them: one rank a node copies, the others wait and know for what."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirai_ds.config import DataConfig, RunConfig, UserError
from mirai_ds.data.staging import open_any, place_of, stage_folder, stage_store
from mirai_ds.data.stores import IMAGE_FORMAT, store_format
from mirai_ds.runtime.control import Control
from mirai_ds.runtime.distributed import World
from mirai_ds.runtime.log import LOG

TOLD_SECONDS = 30.0
LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Progress:
    """What one rank knows of its node's copies: where, bytes, whether they are there, and what went wrong."""

    host: str
    store: str = ""
    done: int = 0
    total: int = 0
    finished: bool = True
    problem: str = ""


class _Copying:
    """The copies of this node, made on a thread, so that the ranks go on telling each other that they are alive."""

    def __init__(self, paths: list[Path], stage: str) -> None:
        self._now = Progress(socket.gethostname(), finished=False)
        self._thread = threading.Thread(target=self._run, args=(paths, stage), daemon=True, name="staging")
        self._thread.start()

    def _run(self, paths: list[Path], stage: str) -> None:
        host = socket.gethostname()
        try:
            folder = stage_folder(stage)
            for path in paths:
                stage_store(path, folder, lambda done, total, path=path: self._tell(str(path), done, total))  # type: ignore[misc]
            self._now = Progress(host)
        except UserError as error:
            self._now = Progress(host, problem=str(error))
        except BaseException as error:  # of a thread nobody would hear
            self._now = Progress(host, problem=f"{stage} on {host}: {type(error).__name__}: {error}")

    def _tell(self, store: str, done: int, total: int) -> None:
        self._now = Progress(self._now.host, store, done, total, finished=False)

    def progress(self) -> Progress:
        """Of this moment."""
        return self._now


def stage_data(
    config: RunConfig, world: World, beat: Callable[[str], None], look: Callable[[], None] = lambda: None
) -> DataConfig:
    """Collective: the `data` section that names this node's copies; the section itself without `data.stage`.

    The copies have the stores' digests, so order, losses and the checkpoints' digest of the data are those of the
    stores.  Images in their original folder stay there.  beat: tells the watchdog that this rank is alive; look: leaves
    when that was asked for.  Raises UserError on every rank for what went wrong on any node, and where no node has
    copied anything for `launch.timeout_minutes`.
    """
    data = config.data
    if data.stage is None:
        return data
    fields = _stores(data)
    paths = list(dict.fromkeys(path for field in fields.values() for path in field))
    control = Control(config.launch.timeout_minutes)
    copying = _Copying(paths, data.stage) if world.local_rank == 0 else None
    waiting = _Waiting(60 * config.launch.timeout_minutes)
    while True:
        look()
        beat("copying data to the node's disk")
        mine = copying.progress() if copying is not None else Progress(socket.gethostname())
        stuck = waiting.stuck() if world.rank == 0 else ""  # one clock decides, and all hear of it
        told = control.gather((mine, stuck))
        everyone = [progress for progress, _ in told]
        problem = next((p.problem for p in everyone if p.problem), "") or told[0][1]
        if problem:
            raise UserError(problem)
        if all(progress.finished for progress in everyone):
            break
        waiting.note(everyone)
    folder = stage_folder(data.stage)
    copies = {path: str(place_of(open_any(path), folder)) for path in paths}
    LOG.info("data.stage: %d store%s read from %s", len(paths), "s" * (len(paths) > 1), folder)
    changes: dict[str, Any] = {}
    for name, found in fields.items():
        here = [copies[path] for path in found]
        changes[name] = here if name == "more_views" else here[0]
    return data.model_copy(update=changes)


def _stores(data: DataConfig) -> dict[str, list[Path]]:
    """Field -> the stores it names; fields without one are left out."""
    images = data.images if data.images and store_format(Path(data.images)) == IMAGE_FORMAT else None
    if data.images and images is None:
        LOG.info("data.stage: data.images is a folder of image files and is read where it is")
    named: dict[str, list[str | None]] = {
        "path": [data.path],
        "more_views": [*data.more_views],
        "held_out_path": [data.held_out_path],
        "images": [images],
    }
    return {name: found for name, given in named.items() if (found := [Path(path) for path in given if path])}


class _Waiting:
    """How far the slowest node is, and whether nothing moves any more."""

    def __init__(self, seconds: float) -> None:
        self._limit, self._pause = seconds, 0.01
        self._seen: list[tuple[str, int]] = []
        self._moved = self._told = time.monotonic()
        self._slowest = Progress("")

    def note(self, everyone: Iterable[Progress]) -> None:
        """What all ranks said; waits a little before the next question."""
        busy = [progress for progress in everyone if not progress.finished]
        self._slowest = min(busy, key=lambda p: p.done / max(p.total, 1))
        seen, now = [(p.store, p.done) for p in busy], time.monotonic()
        if seen != self._seen:
            self._seen, self._moved = seen, now
        if now - self._told > TOLD_SECONDS:
            self._told, slowest = now, self._slowest
            share = slowest.done / max(slowest.total, 1)
            LOG.info("data.stage: %s has %.0f %% of %s", slowest.host, 100 * share, slowest.store or "its stores")
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, LOOK_SECONDS)

    def stuck(self) -> str:
        """Why it is not worth waiting any longer; empty while something moves."""
        still = time.monotonic() - self._moved
        if still < self._limit:
            return ""
        slowest = self._slowest
        return (
            f"data.stage: {slowest.host} has copied nothing for {still / 60:.0f} minutes ({slowest.done} of "
            f"{slowest.total} bytes of {slowest.store or 'its stores'}); look at its disk and the stores' file system"
        )
