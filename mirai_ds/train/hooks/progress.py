"""Progress in the terminal: a live bar, or one line a log interval where the output is not a terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

from mirai_ds.runtime.time_left import TimeLeft


class TrainingProgress:
    """Step, loss, learning rate, images/s and time left."""

    def __init__(self, name: str, step: int, total: int, enabled: bool) -> None:
        self._name, self._total, self._left = name, total, TimeLeft(step)
        self._bar: RichProgress | None = None
        if enabled and sys.stdout.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[line]}"),
                self._left, console=Console(),
            )  # fmt: skip
            self._task = self._bar.add_task(name, total=total, completed=step, line="")
            self._bar.start()
        self._plain = enabled and self._bar is None

    def show(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """Bring the display to `step`."""
        line = (
            f"loss {values['loss/total']:.4f}  ntp {values['loss/ntp']:.4f}  lr {values['optimizer/lr']:.2e}  "
            f"{values['speed/images_per_s']:.0f} images/s"
        )
        self._left.report(step, self._total)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line=line)
        elif self._plain:
            where = f"step {step}/{self._total}  epoch {epoch:.2f}"
            print(f"{self._name}  {where}  {line}  {self._left.text()}", flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
