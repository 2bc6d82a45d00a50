"""A step that does not end: every rank's stacks on paper, then an end, so that the scheduler can start again."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

# Python's own thread cannot run while C code holds the interpreter's lock; faulthandler's needs no interpreter.
from mirai_ds.runtime.log import LOG

BACKUP_SECONDS = 30.0
# Whoever leaves first makes launchers kill the others: wait for their stacks.
PEERS_SECONDS = 10.0


# A machine that needs long for every step is slow, not hung: a step may take this many times as long as the slowest one
# before it, the second step this many times as long as the first, which compiles and warms up.
SLOWER_THAN_SLOWEST = 5.0
SLOWER_THAN_FIRST = 2.0


class Watchdog:
    """`beat()` at each step and within long phases.  Without one for `seconds`: dump, report, exit.

    The first step of a process may take `first_seconds`: it compiles, and says how fast the machine is.  Where steps
    are slow, later ones are given more than `seconds` (`limit`).
    """

    def __init__(
        self,
        seconds: float,
        folder: Path,
        rank: int,
        world: int,
        on_hang: Callable[[str], None],
        first_seconds: float | None = None,
    ) -> None:
        self.seconds, self.folder, self.rank, self.world, self._on_hang = seconds, folder, rank, world, on_hang
        self.first_seconds = max(seconds, first_seconds or seconds)
        self._phase, self._last = "starting", time.monotonic()
        self._in_step, self._steps = False, 0
        self._first, self._slowest = 0.0, 0.0  # seconds of the first step and of the slowest one after it
        self._stop = threading.Event()
        self._backup = 0.0
        threading.Thread(target=self._run, daemon=True, name="watchdog").start()
        self._arm_backup()

    def beat(self, phase: str) -> None:
        """Alive, and in `phase` from now on; a phase that begins with `step` is a training step."""
        now, before = time.monotonic(), self.limit
        if self._in_step:
            self._steps += 1
            if self._steps == 1:
                self._first = now - self._last
            else:
                self._slowest = max(self._slowest, now - self._last)
        self._in_step = phase.startswith("step ")
        self._phase, self._last = phase, now
        if now - self._backup > min(5.0, self.seconds / 10) or self.limit != before:
            self._arm_backup()

    @property
    def limit(self) -> float:
        """Seconds that the present phase may take."""
        if not self._in_step:
            return self.seconds
        if self._steps == 0:
            return self.first_seconds
        return max(self.seconds, SLOWER_THAN_FIRST * self._first, SLOWER_THAN_SLOWEST * self._slowest)

    def _arm_backup(self) -> None:
        self._backup = time.monotonic()
        faulthandler.dump_traceback_later(self.limit + BACKUP_SECONDS, exit=True)

    def _run(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 10)):
            silent = time.monotonic() - self._last
            if silent > self.limit:
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
            LOG.error("%s; its stacks could not be written: %s", text, error)
            faulthandler.dump_traceback(all_threads=True)
        LOG.error("%s; stacks of all ranks are in %s", text, self.folder)
        self._on_hang(text)
        os._exit(75)

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        faulthandler.cancel_dump_traceback_later()
