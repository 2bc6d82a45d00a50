"""How far all ranks together have come: a bar on a terminal, a line every half minute in a log."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from mirai_ds.resumable.parts import missing_blocks
from mirai_ds.resumable.plan import WorkPlan
from mirai_ds.runtime.log import LOG
from mirai_ds.runtime.time_left import TimeLeft

LINE_SECONDS, LOOK_SECONDS = 30.0, 1.0


class WorkProgress:
    """Counts the finished parts in the folder, whoever made them."""

    def __init__(self, plan: WorkPlan, folder: Path, speaks: bool) -> None:
        self.plan, self.folder, self.speaks = plan, folder, speaks
        self._began = self._looked = self._spoke = time.monotonic()
        self._first = self._done()
        self._left = TimeLeft(self._first)
        self._bar: Bar | None = None
        console = Console(stderr=True)
        if speaks and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), self._left)
            self._bar = Bar(*columns, TextColumn("{task.fields[rate]}"), console=console)
            self._task = self._bar.add_task("images", total=plan.num_images, completed=self._first, rate="")
            self._bar.start()
        elif self._first:
            LOG.info("going on after %d of %d images", self._first, plan.num_images)

    def _done(self) -> int:
        if not self.speaks:
            return 0
        missing = sum(len(self.plan.images_of(block)) for block in missing_blocks(self.folder, self.plan))
        return self.plan.num_images - missing

    def tell(self) -> None:
        """Counts again and reports, at most once a second."""
        now = time.monotonic()
        if not self.speaks or now - self._looked < LOOK_SECONDS:
            return
        self._looked, done = now, self._done()
        rate = (done - self._first) / (now - self._began)
        self._left.report(done, self.plan.num_images)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=f"{rate:.1f}/s")
        elif now - self._spoke >= LINE_SECONDS:
            self._spoke = now
            LOG.info("%d of %d images, %.1f/s, %s", done, self.plan.num_images, rate, self._left.text())

    def close(self) -> None:
        """Takes the bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
