"""Requests to stop: SIGTERM, SIGUSR1 (Slurm's --signal), SIGINT, or a file named `stop` in the run's folder."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

STOP_FILE = "stop"
STOP_FILE_VARIABLE = "MIRAI_DS_STOP_FILE"  # names one that is for a single start, not for whoever holds the run
CAUGHT = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# One event often arrives twice: Slurm sends TERM, CONT, TERM, launchers repeat what a terminal sent already.
SAME_EVENT_SECONDS = 5.0
# After a second request a checkpoint that is being written may be finished: Slurm's KillWait is 30 s by default.
LAST_SECONDS = 20.0
ABANDONED_SECONDS = 10.0  # for the step of a rank whose launcher is gone, before its save
NOTHING, REQUEUE, STOP = 0, 1, 2  # what was asked for; the larger wins


def is_ignored(number: int) -> bool:
    """Whether whoever started this process wants the signal ignored: `nohup`, or a shell's `&`."""
    return signal.getsignal(number) == signal.SIG_IGN


class StopRequests:
    """Remembers the first request.  A second one, or the deadline, ends the process wherever it is.

    A signal is read from a pipe by a thread of its own: Python's handlers wait until the main thread returns from a
    collective or a kernel, which a hanging one never does.
    """

    def __init__(self, deadline_seconds: float | None = None) -> None:
        self.deadline_seconds = deadline_seconds
        self.kind, self.reason = NOTHING, ""
        self.is_saving: Callable[[], bool] = lambda: False  # whether a checkpoint is on its way
        self.unsaved_steps: Callable[[], int] = lambda: 1  # how many steps leaving at once would lose
        self.leave: Callable[[str], None] = lambda reason: os._exit(75)
        self.obeyed = False  # set by the loop once the ranks leave because of the request
        self._first = 0.0
        self._stop_files: list[Path] = []
        self._looked = 0.0

    def install(self) -> None:
        """Catch the signals.  From the main thread, before anything slow."""
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in CAUGHT:
            if not is_ignored(number):
                signal.signal(number, lambda *_: None)
        faulthandler.register(signal.SIGUSR2, all_threads=True)  # `kill -USR2 PID` shows where a rank is
        threading.Thread(target=self._listen, args=(read_end,), daemon=True, name="signals").start()

    def _listen(self, read_end: int) -> None:
        while True:
            for number in os.read(read_end, 64):
                if number in CAUGHT:
                    kind = STOP if number == signal.SIGINT else REQUEUE
                    self.request(kind, signal.Signals(number).name)

    def watch_file(self, path: Path) -> None:
        """Also obey this file: empty means stop, the word `requeue` in it means stop and be requeued.

        A thread looks for it too: the main one comes by between steps, and the first may take minutes.
        """
        self._stop_files.append(path)
        if len(self._stop_files) > 1:
            return  # the thread of the first looks for all
        threading.Thread(target=self._watch, daemon=True, name="stop file").start()

    def _watch(self) -> None:
        while self.poll() == NOTHING:
            time.sleep(2.0)

    def request(self, kind: int, reason: str) -> None:
        """Ask for a stop; may be called by any thread."""
        now = time.monotonic()
        if self.kind == NOTHING:
            self.kind, self.reason, self._first = kind, reason, now
            if self.deadline_seconds is not None:
                self._leave_after(self.deadline_seconds, f"{reason}; not done within {self.deadline_seconds:g} s")
            if self.unsaved_steps() == 0:
                self._leave_after(LAST_SECONDS, f"{reason}; no step to save", unless=self._is_getting_on)
        elif now - self._first > SAME_EVENT_SECONDS:
            self.kind = max(self.kind, kind)
            if not self.is_saving():
                self.leave(f"{self.reason}, then {reason}: left at once")
            self._leave_after(LAST_SECONDS, f"{self.reason}, then {reason}: left while saving")

    def abandon(self, reason: str) -> None:
        """Nobody waits for this process any more: stop after this step and save, but do not stay for long."""
        self.request(REQUEUE, reason)
        self._leave_after(ABANDONED_SECONDS, f"{reason}; left within a step", unless=self.is_saving)
        self._leave_after(ABANDONED_SECONDS + LAST_SECONDS, f"{reason}; left while saving")

    def _is_getting_on(self) -> bool:
        """Whether the step during which the request came has ended, or a save is under way: then the loop leaves."""
        return self.obeyed or self.unsaved_steps() > 0 or self.is_saving()

    def _leave_after(self, seconds: float, reason: str, unless: Callable[[], bool] = lambda: False) -> None:
        timer = threading.Timer(seconds, lambda: None if unless() else self.leave(reason))
        timer.daemon = True
        timer.start()

    def poll(self) -> int:
        """What is asked for by now; looks for the file once a second at most."""
        now = time.monotonic()
        if self._stop_files and self.kind == NOTHING and now - self._looked > 1.0:
            self._looked = now
            for path in self._stop_files:
                try:
                    text = path.read_text(encoding="utf-8", errors="replace").strip()
                except OSError:
                    continue
                word, _, reason = text.partition(" ")
                self.request(REQUEUE if word == "requeue" else STOP, reason or "stop file")
                break
        return self.kind
