"""The trackers by their names in the configuration (`tracking:`)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from mirai_ds.config import ConfigError
from mirai_ds.config.own import import_own
from mirai_ds.tracking.csv_file import CsvFile
from mirai_ds.tracking.tensorboard import TensorBoard
from mirai_ds.tracking.tracker import CLOSE_SECONDS, BackgroundTracker, TrackedRun, Tracker
from mirai_ds.tracking.wandb_run import WandbRun

TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandbRun, "csv": CsvFile}


def find_trackers(names: Sequence[str]) -> dict[str, type[Tracker]]:
    """Of `TRACKERS`, or `package.module:Class` of your own.  Raises ConfigError for what cannot be imported or is no
    tracker, and UserError for one that cannot work here."""
    found = {name: TRACKERS.get(name) or _own(name) for name in names}
    for one in found.values():
        one.check()
    return found


def _own(name: str) -> type[Tracker]:
    made = import_own(name, "tracking")
    if not (isinstance(made, type) and issubclass(made, Tracker)):
        raise ConfigError("tracking", name, "is no subclass of mirai_ds.tracking.Tracker")
    return made


def close_trackers(trackers: Sequence[BackgroundTracker], seconds: float = CLOSE_SECONDS) -> None:
    """Let all of them, together and at most so long, write what waits."""
    deadline = time.monotonic() + seconds
    for one in trackers:
        one.end()
    for one in trackers:
        one.close(max(0.0, deadline - time.monotonic()))


def open_trackers(found: dict[str, type[Tracker]], run: TrackedRun) -> list[BackgroundTracker]:
    """Each on a thread of its own."""
    return [BackgroundTracker(name, partial(one, run), one.machine_values) for name, one in found.items()]
