"""Who may write into a run: every start takes the next number; whoever no longer holds the highest one stops.

After a requeue, ranks of the earlier start can still be alive (a node's daemon died, the node did not), and two jobs
can be started on one folder by mistake.  `RUN/incarnations/00003.json` is created exclusively, so of two that start at
once one wins on any file system that has exclusive creation.  A writer looks before it writes; what slips through
between the look and the write (nothing can be renamed conditionally) is recognised later: a checkpoint says which
incarnation wrote it, and one beyond the step where a later incarnation took over is on a dead branch, never loaded.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mirai_ds.config import UserError
from mirai_ds.runtime.disk import write_whole
from mirai_ds.runtime.processes import Identity, start_time

FOLDER, HEARTBEAT = "incarnations", "heartbeat"
HEARTBEAT_SECONDS = 2.0
SILENCE_SECONDS = 15.0  # without a heartbeat for so long, a holder on another node is taken for dead


class RunTakenOverError(UserError):
    """This process no longer holds the run and must not write into it."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run: its number, who it is, where it began, how it ended."""

    number: int
    id: str
    host: str
    space: str  # boot and process-id namespace: a pid means something only in there
    pid: int
    pid_started: str
    job: str
    restart: int
    started: float  # unix time of its host
    resumed_after: int | None = None  # 0: began anew; None: has not begun
    resumed_from: int | None = None  # the incarnation that wrote that checkpoint
    ended: str | None = None

    @property
    def who(self) -> str:
        """For messages."""
        if not self.pid:
            return f"start {self.number} (says nothing of itself)"
        job = f"job {self.job} restart {self.restart}, " if self.job else ""
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"start {self.number} ({job}host {self.host}, pid {self.pid}, since {began})"


def _myself(number: int) -> Attempt:
    env, me = os.environ, Identity.of(os.getpid())
    return Attempt(
        number, uuid.uuid4().hex, me.host, me.space, me.pid, me.started, env.get("SLURM_JOB_ID", ""),
        int(env.get("SLURM_RESTART_COUNT") or 0), time.time(),
    )  # fmt: skip


def path_of(run: Path, number: int) -> Path:
    """File of an incarnation."""
    return run / FOLDER / f"{number:05d}.json"


def read_one(path: Path) -> Attempt | None:
    """An incarnation's file; None when it is not there or torn."""
    try:
        return Attempt(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def read_all(run: Path) -> list[Attempt]:
    """All attempts, oldest first.  A torn file (its writer died at once) counts as one that did nothing."""
    folder = run / FOLDER
    numbers = sorted(int(p.stem) for p in folder.glob("*.json") if p.stem.isdigit()) if folder.is_dir() else []
    return [
        read_one(path_of(run, n)) or Attempt(n, "", "unknown", "", 0, "", "", 0, 0.0, ended="died at once")
        for n in numbers
    ]


def valid_attempts(attempts: list[Attempt]) -> dict[int, float]:
    """Attempt -> the last step it wrote that the run still builds upon: its newest start, what that one resumed
    from, and so on.  Whoever is not in it wrote nothing that counts.  Empty where no start is known."""
    by_number = {i.number: i for i in attempts if i.resumed_after is not None}
    valid: dict[int, float] = {}
    number, limit = (max(by_number), math.inf) if by_number else (None, math.inf)
    while number is not None and number not in valid:
        valid[number] = limit
        one = by_number.get(number)
        number, limit = (one.resumed_from, min(limit, one.resumed_after or 0)) if one else (None, limit)
    return valid


def _heartbeat(run: Path) -> str:
    try:
        return (run / FOLDER / HEARTBEAT).read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""


def _is_alive(holder: Attempt, run: Path, me: Attempt, patience: float) -> bool:
    """Whether the last start can still write.  No clocks are compared: a heartbeat either changes or it does not."""
    if holder.ended is not None:
        return False
    if holder.job and holder.job == me.job and holder.restart < me.restart:
        return False  # the scheduler requeued it: whatever is left of it must not write
    # Certain at once, unlike the heartbeat; a process that took the holder's pid later has another start time.
    if holder.space and holder.space == me.space:
        return start_time(holder.pid) == holder.pid_started
    before, until = _heartbeat(run), time.monotonic() + patience
    while time.monotonic() < until:
        if _heartbeat(run) != before:
            return True
        time.sleep(min(0.2, patience))
    return False


def check_free(run: Path, patience: float = SILENCE_SECONDS) -> None:
    """Raises UserError when a living start holds the run.  Waits `patience` seconds where only silence can tell."""
    known = read_all(run)
    if known and _is_alive(known[-1], run, _myself(0), patience):
        raise UserError(
            f"{run}: is being trained by {known[-1].who}; wait for it, stop it with `touch {run / 'stop'}`, or choose "
            "another --run-dir"
        )


def _create(run: Path, mine: Attempt) -> bool:
    path = path_of(run, mine.number)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not `write_whole`: a rename replaces what is there, and of two that start at once both would have won.  The price
    # is a torn file where a process dies in the next three lines; `read_all` counts it as a start that did nothing.
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(mine)))
        file.flush()
        os.fsync(file.fileno())
    return True


class RunLock:
    """The main rank's hold on a run; other ranks have a copy that only looks."""

    def __init__(self, run: Path, mine: Attempt, main: bool = True, found: str = "") -> None:
        self.run, self.mine, self._main = run, mine, main
        self._found = found  # the heartbeat file's content before this start
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # `mine` and its file change together
        self.lost = False

    @classmethod
    def take(cls, run: Path, patience: float = SILENCE_SECONDS) -> RunLock:
        """Take the run for this process.  Raises UserError while somebody else lives in it."""
        check_free(run, patience)
        known, heartbeat = read_all(run), _heartbeat(run)
        mine = _myself(known[-1].number + 1 if known else 1)
        # Not tried again with the next number: that would take the run from the one who has just won.
        if not _create(run, mine):
            raise UserError(f"{run}: another job is starting in it at this moment; start one of them only")
        return cls(run, mine, found=heartbeat)

    def withdraw(self) -> None:
        """Leave the run as it was before `take`, for a start that was refused: no attempt is left to be counted.  Of a
        folder that `take` made nothing stays."""
        self._end_heartbeat()
        try:
            self.check()
            if self._found:
                (self.run / FOLDER / HEARTBEAT).write_text(self._found, encoding="ascii")
            else:
                (self.run / FOLDER / HEARTBEAT).unlink(missing_ok=True)
            path_of(self.run, self.mine.number).unlink()
            (self.run / FOLDER).rmdir()
            self.run.rmdir()
        except (RunTakenOverError, OSError):  # another's, or not empty
            return

    def check(self) -> None:
        """Raises RunTakenOverError when a later start holds the run, or the folder is another's."""
        with self._lock:
            # Two look-ups and no listing, every two seconds on a shared file system: numbers have no gaps, so a later
            # start has made the next one.  The own file is another's where the folder was set aside and begun anew.
            there = read_one(path_of(self.run, self.mine.number))
            taken = path_of(self.run, self.mine.number + 1)
            if there is not None and there.id == self.mine.id and not taken.exists():
                return
        self.lost = True
        later = read_all(self.run)
        by = later[-1].who if later and later[-1].id != self.mine.id else "somebody else (its files are gone)"
        raise RunTakenOverError(f"{self.run}: was taken over by {by}; this is {self.mine.who}; nothing more is written")

    def watch(self, on_lost: Callable[[], None] | None = None) -> None:
        """Beat, and look, from a thread of its own until released."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, args=(on_lost,), daemon=True, name="run_lock")
        self._thread.start()

    def _beat(self, on_lost: Callable[[], None] | None) -> None:
        count = 0
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                self.check()
                if self._main:
                    count += 1
                    # Not `write_whole`, which flushes: a torn heartbeat differs from the one before as well.
                    (self.run / FOLDER / HEARTBEAT).write_text(f"{self.mine.number} {count}", encoding="ascii")
            except RunTakenOverError:
                if on_lost is not None:
                    on_lost()
                return
            except OSError:
                continue  # a full disk or a hiccup of the file system; others see silence only after a while

    def note_start(self, resumed_after: int, resumed_from: int | None) -> None:
        """Note from whose step this start goes on (0, None: from the beginning): what others wrote later is dead."""
        self._rewrite(resumed_after=resumed_after, resumed_from=resumed_from)

    def renew(self, resumed_after: int, resumed_from: int | None) -> None:
        """Go back to an earlier step within this start: take the next number."""
        self.check()
        # The old number's end first: a process that dies before it has the new one leaves a run that nobody holds.
        self._rewrite(ended=f"rolled back to step {resumed_after}")
        mine = replace(
            self.mine, number=self.mine.number + 1, id=uuid.uuid4().hex, resumed_after=resumed_after,
            resumed_from=resumed_from, ended=None, started=time.time(),
        )  # fmt: skip
        with self._lock:
            if not _create(self.run, mine):
                raise RunTakenOverError(f"{self.run}: was taken over by another start; nothing more is written")
            self.mine = mine

    def release(self, ended: str) -> None:
        """Note how this start ended; the next need not wait."""
        self._end_heartbeat()
        if not self.lost:
            try:
                self.check()
                self._rewrite(ended=ended)
            except (RunTakenOverError, OSError):
                return

    def _end_heartbeat(self) -> None:
        self._stop.set()  # no heartbeat after the end was noted
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=10)

    def _rewrite(self, **changes: object) -> None:
        self.mine = replace(self.mine, **changes)  # type: ignore[arg-type]
        if not self._main:
            return
        write_whole(path_of(self.run, self.mine.number), json.dumps(asdict(self.mine)))


def starts_without_progress(attempts: list[Attempt], resumes_after: int) -> int:
    """How many of the newest starts in a row died or failed without getting beyond `resumes_after`.

    A start that was asked to leave (preempted, stopped) is no sign of a fault.
    """
    count = 0
    for one in reversed(attempts):
        orderly = one.ended is not None and one.ended.split(" ")[0] in ("finished", "requeue", "stopped", "rolled")
        if orderly or (one.resumed_after is not None and one.resumed_after != resumes_after):
            break
        count += 1
    return count
