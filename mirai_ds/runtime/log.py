"""What a run tells its user: standard `logging`, one logger, in the terminal and in `RUN/log.txt`.

In the terminal a line begins with `mirai-ds:`; warnings and errors say so.  Errors go to standard error, all else to
standard output.  Rank 0 speaks for all; of the other ranks only errors are heard.
"""

from __future__ import annotations

import logging
import sys
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, TextIO

NAME = "log.txt"
_KEPT_LINES = 10_000
LOG = logging.getLogger("mirai_ds")


class _Terminal(logging.Handler):
    """Streams are looked up anew for each line: they may be replaced while a process lives."""

    def emit(self, record: logging.LogRecord) -> None:
        word = {logging.WARNING: "warning: ", logging.ERROR: "error: "}.get(record.levelno, "")
        try:
            print(f"mirai-ds: {word}{record.getMessage()}", file=_stream(record), flush=True)
        except (OSError, ValueError):  # a closed pipe ends no run
            return


def _stream(record: logging.LogRecord) -> TextIO:
    return sys.stderr if record.levelno >= logging.ERROR else sys.stdout


def start_log(rank: int = 0) -> None:
    """Log to the terminal, once a process: of rank 0 from INFO on, of the others errors.  What is said is kept for the
    file that `log_into` opens."""
    LOG.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    LOG.propagate = False
    if not any(isinstance(handler, _Terminal) for handler in LOG.handlers):
        LOG.addHandler(_Terminal())
        LOG.addHandler(MemoryHandler(_KEPT_LINES, flushLevel=sys.maxsize))


def log_into(run: Path, rank: int) -> None:
    """Add a run's `log.txt`: time (local, ISO 8601), level, rank, text; exceptions with their stacks.  What was said
    since `start_log` comes first.  A disk that is full or gone costs the log, never the run."""
    close_log()
    handler = _Quiet(run / NAME, mode="a", encoding="utf-8", delay=True)
    formatter = logging.Formatter(f"%(asctime)s %(levelname)s rank {rank}: %(message)s", "%Y-%m-%dT%H:%M:%S%z")
    handler.setFormatter(formatter)
    for kept in [kept for kept in LOG.handlers if isinstance(kept, MemoryHandler)]:
        kept.setTarget(handler)
        kept.close()  # hands over
        LOG.removeHandler(kept)
    LOG.addHandler(handler)


class _Quiet(logging.FileHandler):
    """Unlike the standard handler it prints no traceback about itself."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:
            return

    def handleError(self, record: Any) -> None:  # noqa: N802  # the standard library's name
        """Does nothing."""


def log_crash(error: BaseException) -> None:
    """An exception with its stack, into the run's file only: the terminal has it already."""
    record = LOG.makeRecord(
        LOG.name, logging.CRITICAL, __file__, 0, "crashed", (), (type(error), error, error.__traceback__)
    )
    for handler in LOG.handlers:
        if isinstance(handler, _Quiet):
            handler.emit(record)


def close_log() -> None:
    """Closes the run's log file."""
    for handler in [handler for handler in LOG.handlers if isinstance(handler, _Quiet)]:
        LOG.removeHandler(handler)
        handler.close()
