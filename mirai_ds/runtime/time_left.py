"""The time that is left of counted work, as terminals and logs show it."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.progress import ProgressColumn, Task
from rich.table import Column
from rich.text import Text


class TimeLeft(ProgressColumn):
    """By the mean pace since the start, counting down between two reports; rich's own forgets a pace after 30 seconds
    without a report, and shows -:--:-- from then on.

    Until the first report there is none: it says how long the work has been going on.
    """

    max_refresh = 0.5

    def __init__(self, done: int, clock: Callable[[], float] = time.monotonic) -> None:
        """done: of the work, before this start."""
        super().__init__(Column(no_wrap=True))
        self._clock, self._first, self._began = clock, done, clock()
        self._seen: float = done
        self._left: float | None = None
        self._reported = self._began

    def report(self, done: int, total: int) -> None:
        """So much of the work is done now."""
        self._reported, self._seen = self._clock(), done
        if done > self._first:
            self._left = (self._reported - self._began) / (done - self._first) * (total - done)

    def seconds(self) -> float | None:
        """Seconds left now; None before anything was done."""
        return None if self._left is None else max(0.0, self._left - (self._clock() - self._reported))

    def text(self) -> str:
        """`1:02:03 left`, or `0:12 so far` before anything was done."""
        left = self.seconds()
        return f"{_clock(self._clock() - self._began)} so far" if left is None else f"{_clock(left)} left"

    def render(self, task: Task) -> Text:
        """See `ProgressColumn`.  What the bar has been told since counts as a report."""
        if task.completed != self._seen and task.total:
            self.report(int(task.completed), int(task.total))
        return Text(self.text(), style="progress.remaining")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
