"""A run's folder: held by one start at a time, and changed by none that was refused."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mirai_ds.checkpoint import store
from mirai_ds.config import RunConfig, UserError, dump
from mirai_ds.config.deepspeed_file import resolve
from mirai_ds.runs.lock import Attempt, RunLock, read_all, starts_without_progress
from mirai_ds.runs.outcome import NAME as OUTCOME
from mirai_ds.runtime.disk import left_behind, write_whole
from mirai_ds.runtime.distributed import World
from mirai_ds.runtime.environment import describe
from mirai_ds.runtime.log import LOG
from mirai_ds.runtime.signals import STOP_FILE


class RunFolder:
    """This start's hold on a run.  Between `open` and `accept` everything that a mistake of the user could spoil is
    looked at (data, teacher, checkpoint, hooks); in the folder there is meanwhile only a new file of the run lock, and
    `refuse` takes that back.

    resume: the request to obey, None to begin anew; lock: this rank's hold.
    """

    def __init__(self, run: Path, world: World, resume: str | None, fresh: bool, lock: RunLock) -> None:
        self.run, self.world, self.resume, self.fresh, self.lock = run, world, resume, fresh, lock
        self.accepted = False
        self._earlier_stop = _identity(run / STOP_FILE)

    @classmethod
    def open(cls, config: RunConfig, run: Path, world: World, resume: str | None, fresh: bool) -> RunFolder:
        """Collective: the main rank takes the folder.  Raises UserError on every rank (`store.check_run_folder` says
        what is refused)."""
        lock: RunLock | None = None

        def take() -> tuple[str | None, Attempt]:
            nonlocal lock
            store.check_run_folder(run, resume, fresh)
            run.mkdir(parents=True, exist_ok=True)
            lock = RunLock.take(run)
            if resume != "if-present":
                return resume, lock.mine
            try:
                _check_progress(run, config.guard.max_restarts)
            except UserError:
                lock.withdraw()
                raise
            return (resume if store.list_steps(run) else None), lock.mine

        obeyed, mine = _on_main_rank(world, run, take)
        return cls(run, world, obeyed, fresh, lock or RunLock(run, mine, main=False))

    def accept(self, config: RunConfig, facts: dict[str, Any]) -> None:
        """Collective, once nothing is left that could refuse this start: set an earlier run aside if that was asked
        for, and write what explains this one, with `facts` about it.  Raises UserError on every rank."""

        def write() -> Attempt:
            if self.fresh and self.resume is None:
                self.lock.withdraw()
                set_aside(self.run)
                self.run.mkdir(parents=True, exist_ok=True)
                self.lock.mine = RunLock.take(self.run).mine
                self.lock.watch()
            for path in left_behind(self.run / "*"):
                path.unlink(missing_ok=True)
            for path in store.half_done(self.run):
                shutil.rmtree(path, ignore_errors=True)
            (self.run / OUTCOME).unlink(missing_ok=True)
            if self._earlier_stop == _identity(self.run / STOP_FILE):  # else it is for this start
                (self.run / STOP_FILE).unlink(missing_ok=True)
            if self.resume is None:
                self.lock.note_start(0, None)
            explain(config, self.run, self.world.size, {"incarnation": self.lock.mine.number, **facts})
            return self.lock.mine

        self.lock.mine = _on_main_rank(self.world, self.run, write)
        self.accepted = True

    def refuse(self, reason: str) -> None:
        """On the main rank: this start ends with `reason`, a mistake of the user.  Before `accept` nothing of it
        stays."""
        if self.world.rank == 0:
            if self.accepted:
                self.lock.release(f"failed {reason}")
            else:
                self.lock.withdraw()


def _on_main_rank(world: World, run: Path, do: Callable[[], Any]) -> Any:
    """Collective: what `do()` returns on rank 0.  What it raises there is a UserError on every rank."""
    problem, result = "", None
    if world.rank == 0:
        try:
            result = do()
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{run}: cannot be written ({error})"
    said: list[Any] = [problem, result]
    dist.broadcast_object_list(said, src=0)
    if said[0]:
        raise UserError(said[0])
    return said[1]


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _check_progress(run: Path, most: int) -> None:
    """A scheduler requeues for ever: after `most` starts in a row that died where they began, somebody must look."""
    newest = max(store.list_steps(run), default=0)
    if starts_without_progress(read_all(run)[:-1], newest) >= most:
        raise UserError(
            f"{run}: the last {most} starts died without getting to a checkpoint after step {newest}; find out why, "
            "then continue with --resume auto"
        )


def set_aside(run: Path) -> None:
    """Rename an earlier run of this name to the first free NAME.old-N; nothing is deleted."""
    if not run.exists():
        return
    number = 1
    while (aside := run.with_name(f"{run.name}.old-{number}")).exists():
        number += 1
    run.rename(aside)
    LOG.info("set the earlier run aside as %s", aside)


def keep_settings(run: Path, text: str) -> None:
    """Write earlier settings to config.before-SECONDS.yaml, which no other has: starts may follow within a second.  A
    copy, not a rename: a kill in between must not leave the run without its settings."""
    second = int(time.time())
    while (path := run / f"config.before-{second}.yaml").exists():
        second += 1
    write_whole(path, text)


def explain(config: RunConfig, run: Path, world_size: int, facts: dict[str, Any]) -> None:
    """Write the files that say what a start was: settings, DeepSpeed's, the machine's, a line in starts.jsonl."""
    path, text = run / "config.yaml", dump(config)
    if path.exists() and (before := path.read_text(encoding="utf-8")) != text:  # a resume with others keeps both
        keep_settings(run, before)
    write_whole(path, text)
    write_whole(run / "deepspeed.json", json.dumps(resolve(config, world_size), indent=2) + "\n")
    environment = {**describe(world_size), **facts}
    write_whole(run / "environment.json", json.dumps(environment, indent=2) + "\n")
    with (run / "starts.jsonl").open("a", encoding="utf-8") as file:  # one line a start, resumes included
        file.write(json.dumps({"unix_time": int(time.time()), **environment}) + "\n")
