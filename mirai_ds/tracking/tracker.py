"""What takes a run's values beside metrics.jsonl: the protocol, and the thread on which each tracker works."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from mirai_ds.runtime.log import LOG

Picture = np.ndarray[Any, Any]

WAITING = 2000  # calls that a slow tracker may be behind; further values are left out
CLOSE_SECONDS = 30.0  # for what is still waiting at the end: a job that is preempted has not much longer


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told when a process begins to write.

    name, folder: the run's.  step: the finished steps that it goes on after; 0: it begins anew.  What was written for
    later steps comes again, with the same values unless the run went back to leave batches out.  recorded: the first
    bytes of `folder/metrics.jsonl` that hold up to there.  config: the resolved configuration, JSON-ready.
    """

    name: str
    folder: Path
    step: int
    recorded: int
    config: dict[str, Any]


class Tracker:
    """Base of all trackers: what is not overridden does nothing.  Rank 0 has one of each, on a thread of its own, so
    that it may wait for disks and networks; what it raises is told once, and training goes on."""

    machine_values = True  # whether it wants values that tell of the machine and are not in metrics.jsonl

    @classmethod
    def check(cls) -> None:
        """Before the run is accepted: raises UserError where it cannot work, e.g. without a package."""

    def __init__(self, run: TrackedRun) -> None:
        """Open it.  Called on its thread."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Named values of a step.  Steps never fall; one step may come in several calls."""

    def image(self, name: str, image: Picture, step: int) -> None:
        """A uint8 (H, W, 3) picture."""

    def text(self, name: str, text: str, step: int) -> None:
        """Preformatted text."""

    def close(self) -> None:
        """Write what waits, and end."""


class BackgroundTracker:
    """A tracker on a thread.  No method waits, but `close`, and none raises."""

    def __init__(self, name: str, make: Callable[[], Tracker], machine_values: bool = True) -> None:
        """name: as in the configuration.  make: opens the tracker, on the thread."""
        self.name, self.machine_values, self._make = name, machine_values, make
        self._calls: SimpleQueue[Callable[[Tracker], None] | None] = SimpleQueue()
        self._told = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def scalars(self, values: dict[str, float], step: int) -> None:
        """See `Tracker.scalars`."""
        self._put(lambda tracker: tracker.scalars(values, step))

    def image(self, name: str, image: Picture, step: int) -> None:
        """See `Tracker.image`."""
        self._put(lambda tracker: tracker.image(name, image, step))

    def text(self, name: str, text: str, step: int) -> None:
        """See `Tracker.text`."""
        self._put(lambda tracker: tracker.text(name, text, step))

    def end(self) -> None:
        """Nothing more will come: it closes when it has written what waits."""
        self._calls.put(None)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """`end`, and wait for it, at most so long."""
        self.end()
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._tell(f"is not done after {seconds:g} s")

    def _put(self, call: Callable[[Tracker], None]) -> None:
        if not self._thread.is_alive():
            return
        if self._calls.qsize() >= WAITING:
            self._tell(f"is {WAITING} values behind, the next are left out")
            return
        self._calls.put(call)

    def _work(self) -> None:
        try:
            tracker = self._make()
        except BaseException as error:  # also SystemExit, of packages that mean to end a script
            self._tell(f"cannot begin: {type(error).__name__}: {error}")
            return
        while (call := self._calls.get()) is not None:
            self._guarded(lambda call=call: call(tracker))  # type: ignore[misc]
        self._guarded(tracker.close)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            self._tell(f"{type(error).__name__}: {error}")

    def _tell(self, problem: str) -> None:
        """Once: the next failure is mostly the same one."""
        if not self._told:
            self._told = True
            text = " ".join(problem.split())
            LOG.warning("tracking %s: %s; training goes on, metrics.jsonl has all values", self.name, text)
