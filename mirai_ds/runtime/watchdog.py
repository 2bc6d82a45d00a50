"""A step that does not end: every rank's stacks on paper, then an end, so that the scheduler can start again."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

# Python's own thread cannot run while C code holds the interpreter's lock; faulthandler's needs no interpreter.
BACKUP_SECONDS = 30.0
# Whoever leaves first makes launchers kill the others: wait for their stacks.
PEERS_SECONDS = 10.0


class Watchdog:
    """`beat()` at each step and within long phases.  Without one for `seconds`: dump, report, exit."""

    def __init__(self, seconds: float, folder: Path, rank: int, world: int, on_hang: Callable[[str], None]) -> None:
        self.seconds, self.folder, self.rank, self.world, self._on_hang = seconds, folder, rank, world, on_hang
        self._phase, self._last, self._armed = "starting", time.monotonic(), True
        self._stop = threading.Event()
        self._backup = 0.0
        threading.Thread(target=self._run, daemon=True, name="watchdog").start()
        self._arm_backup()

    def beat(self, phase: str) -> None:
        """Alive, and in `phase` from now on."""
        now = time.monotonic()
        self._phase, self._last = phase, now
        if now - self._backup > min(5.0, self.seconds / 10):
            self._arm_backup()

    def _arm_backup(self) -> None:
        self._backup = time.monotonic()
        faulthandler.dump_traceback_later(self.seconds + BACKUP_SECONDS, exit=True)

    def _run(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 10)):
            silent = time.monotonic() - self._last
            if silent > self.seconds:
                self._give_up(silent)

    def _give_up(self, silent: float) -> None:
        text = f"rank {self.rank}: no step for {silent:.0f} s, in phase: {self._phase}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank-{self.rank:05d}.txt").open("w", encoding="utf-8") as file:
                file.write(text + "\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            until = time.monotonic() + PEERS_SECONDS
            while len(list(self.folder.glob("rank-*.txt"))) < self.world and time.monotonic() < until:
                time.sleep(0.1)
        except OSError as error:
            print(f"mirai-ds: {text}; its stacks could not be written: {error}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        print(f"mirai-ds: error: {text}; stacks of all ranks are in {self.folder}", file=sys.stderr, flush=True)
        self._on_hang(text)
        os._exit(75)

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        faulthandler.cancel_dump_traceback_later()
