"""Writing checkpoints: aside, digested, flushed, renamed, pointed to last; at once or behind the training's back.

Every rank writes its own slices into `step-N.partial-I` (I: the incarnation), and when all have, the main rank seals
the folder with a manifest and renames it.  Nobody else renames into place, so a checkpoint is whole or not there.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from mirai_ds.checkpoint import store
from mirai_ds.checkpoint.format import Snapshot, rank_file, write_snapshot
from mirai_ds.checkpoint.store import INFO, MANIFEST, POINTER, CheckpointInfo, folder_of
from mirai_ds.config import CheckpointConfig, UserError
from mirai_ds.runs.lock import RunLock, read_all, valid_attempts
from mirai_ds.runtime.control import Control
from mirai_ds.runtime.disk import digest_of_file, sync, write_whole

Report = tuple[str, str, int] | str  # (name, sha256, bytes) or what went wrong


class SaveError(UserError):
    """A checkpoint could not be written; earlier ones are intact."""


@dataclass
class _Job:
    info: CheckpointInfo
    partial: Path
    thread: threading.Thread | None = None
    report: Report = "not written"


class Saver:
    """Collective in the same order on every rank.  At most one save is on its way: memory for one copy of the state."""

    def __init__(self, run: Path, rank: int, run_lock: RunLock, control: Control, config: CheckpointConfig) -> None:
        self.run, self.rank, self.run_lock, self.control, self.config = run, rank, run_lock, control, config
        self.stall_seconds = 0.0  # training stood still for saves
        self.write_seconds = 0.0  # the last save took, stalling or not
        self._began = 0.0
        self._job: _Job | None = None

    @property
    def written(self) -> int:
        """The step whose files this rank has written (or failed to); -1 while it writes, or without a save."""
        job = self._job
        return job.info.step if job and (job.thread is None or not job.thread.is_alive()) else -1

    @property
    def in_flight(self) -> int:
        """The step that is on its way; -1 without one."""
        return self._job.info.step if self._job else -1

    def save(self, info: CheckpointInfo, take: Callable[[], Snapshot]) -> None:
        """Collective: write the state that `take` copies; returns when it is safe, or in the background when it is on
        its way.  Raises SaveError on every rank when this or an earlier save failed."""
        began = time.monotonic()
        try:
            self.finish()  # of the one before
            self._start(info, take)
            if not self.config.background:
                self.finish()
        finally:
            self.stall_seconds += time.monotonic() - began

    def _start(self, info: CheckpointInfo, take: Callable[[], Snapshot]) -> None:
        self._began = time.monotonic()
        target = folder_of(self.run, info.step)
        job = _Job(info, target.with_name(f"{target.name}.partial-{info.incarnation}"))
        problem = ""
        if self.rank == 0:
            try:
                self.run_lock.check()  # first: what lies there may be what a later start is writing
                for left in target.parent.glob("step-*.partial-*"):  # of a save that was killed
                    shutil.rmtree(left, ignore_errors=True)
                job.partial.mkdir(parents=True)
            except (UserError, OSError) as error:
                problem = str(error)
        problem = self.control.gather(problem)[0]  # a barrier too: no rank writes before the folder is there
        self._job = job  # with a problem too: ranks hear of failures in `finish`, whichever way a save fails
        if problem:
            job.report = problem
        elif self.config.background:
            snapshot = take()  # here and not in the thread, where the next update would change what is being copied
            job.thread = threading.Thread(target=self._write, args=(job, snapshot), name="save")
            job.thread.start()
        else:
            self._write(job, take())

    def _write(self, job: _Job, snapshot: Snapshot) -> None:
        try:
            self.run_lock.check()
            job.report = _write_rank(rank_file(job.partial, self.rank), snapshot)
        except Exception as error:  # whatever it is (safetensors has errors of its own), the loop must hear of it
            job.report = f"rank {self.rank}: {type(error).__name__}: {error}"

    def finish(self) -> None:
        """Collective: wait for the save on its way and publish it; does nothing without one.  Raises SaveError."""
        job = self._job
        if job is None:
            return
        if job.thread is not None:
            job.thread.join()
        self._job = None  # whatever comes of it: a save that failed is not finished a second time
        reports = self.control.gather(job.report)
        failures = [r for r in reports if isinstance(r, str)]
        if not failures and self.rank == 0:
            try:
                self.run_lock.check()
                self._publish(job, [r for r in reports if not isinstance(r, str)])
            except (UserError, OSError) as error:
                failures = [f"rank 0: {type(error).__name__}: {error}"]
        failures = self.control.gather(failures)[0]  # nobody goes on, or ends, before the checkpoint has its name
        self.write_seconds = time.monotonic() - self._began
        if failures:
            if self.rank == 0:
                shutil.rmtree(job.partial, ignore_errors=True)
            raise SaveError(
                f"checkpoint of step {job.info.step} could not be written ({failures[0]}); earlier ones are intact"
            )

    def save_aside(self, folder: Path, info: CheckpointInfo, take: Callable[[], Snapshot]) -> list[str]:
        """Collective: the same files and manifest in a folder of its own, which no resume looks at; what went wrong."""
        report: Report
        try:
            folder.mkdir(parents=True, exist_ok=True)
            report = _write_rank(rank_file(folder, self.rank), take())
        except Exception as error:
            report = f"rank {self.rank}: {type(error).__name__}: {error}"
        reports = self.control.gather(report)
        failures = [r for r in reports if isinstance(r, str)]
        if not failures and self.rank == 0:
            try:
                _seal(folder, info, [r for r in reports if not isinstance(r, str)])
            except OSError as error:
                failures = [f"rank 0: {type(error).__name__}: {error}"]
        return self.control.gather(failures)[0]

    def poll(self, written_by_all: int) -> None:
        """Collective: publish a background save that every rank has written, by the step's agreed facts."""
        if self._job is not None and written_by_all == self._job.info.step:
            began = time.monotonic()
            try:
                self.finish()
            finally:
                self.stall_seconds += time.monotonic() - began

    def _publish(self, job: _Job, files: list[tuple[str, str, int]]) -> None:
        partial, target = job.partial, folder_of(self.run, job.info.step)
        # Whole before it has its name, its name on disk before it is pointed to, and only then may older ones go: a
        # machine that dies between any two of these leaves a whole checkpoint.
        _seal(partial, job.info, files)
        if target.exists():  # saved before this start went back to an earlier step; rename replaces empty folders only
            _remove(target)
        os.rename(partial, target)
        sync(target.parent)
        pointer = target.parent / POINTER
        write_whole(pointer, target.name)
        for step in superseded(self.run, self.config):
            _remove(folder_of(self.run, step))

    def close(self) -> None:
        """Not collective: forget a save on its way (this process ends on an error)."""
        self._job = None


def _write_rank(path: Path, snapshot: Snapshot) -> tuple[str, str, int]:
    write_snapshot(path, snapshot)
    sync(path)
    return path.name, digest_of_file(path), path.stat().st_size


def _seal(folder: Path, info: CheckpointInfo, files: list[tuple[str, str, int]]) -> None:
    """Write what the files are; the manifest last: with it the folder is a whole checkpoint."""
    path = folder / INFO
    write_whole(path, json.dumps(asdict(info), indent=1))
    entries = {name: {"sha256": sha, "bytes": size} for name, sha, size in files}
    entries[INFO] = {"sha256": digest_of_file(path), "bytes": path.stat().st_size}
    write_whole(folder / MANIFEST, json.dumps({"format": store.FORMAT, "files": entries}, indent=1))


def _remove(folder: Path) -> None:
    """Out of sight in one rename, then deleted: a half-deleted checkpoint never carries a checkpoint's name."""
    aside = folder.with_name(f"{folder.name}.deleted-{os.getpid()}")
    os.rename(folder, aside)
    for left in folder.parent.glob("step-*.deleted-*"):
        shutil.rmtree(left, ignore_errors=True)


def superseded(run: Path, config: CheckpointConfig) -> list[int]:
    """Steps that the retention rules let go: all but the last `keep_last`, every `keep_every_steps`, `keep_steps`, and
    the `keep_best` with the lowest `best_metric`.  Damaged ones and dead branches go when newer whole ones exist."""
    valid = valid_attempts(read_all(run))
    infos: dict[int, CheckpointInfo | None] = {step: _info(run, step) for step in store.list_steps(run)}
    alive = {step: info for step, info in infos.items() if info is not None and store.is_valid(info, valid)}
    keep = {*sorted(alive)[-config.keep_last :], *config.keep_steps}
    if config.keep_every_steps:
        keep |= {step for step in alive if step % config.keep_every_steps == 0}
    scored = [(score, step) for step, info in alive.items() if (score := config.score(info.metrics)) is not None]
    keep |= {step for _, step in sorted(scored)[: config.keep_best]}
    newest = max(alive, default=-1)
    return [step for step in infos if step not in keep and step <= newest]


def _info(run: Path, step: int) -> CheckpointInfo | None:
    try:
        return store.read_info(folder_of(run, step))
    except (OSError, ValueError, TypeError):
        return None
