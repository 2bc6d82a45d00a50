"""How a start of a run ended, in one line for whoever started it: exit codes do not survive the launchers.

`RUN/outcome`, and the file that the variable MIRAI_DS_OUTCOME names (a job's own, which exists even when the run folder
could not be touched).  Its first word is the verdict, the rest the reason.  A start that was accepted removes it; no
file means that the processes died without a word.  One that was refused speaks in the job's file alone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args

from mirai_ds.config.errors import UserError

Verdict = Literal["finished", "requeue", "stopped", "failed"]
EXIT_CODES: dict[Verdict, int] = {"finished": 0, "stopped": 0, "failed": 1, "requeue": 75}  # 75: EX_TEMPFAIL
VARIABLE = "MIRAI_DS_OUTCOME"
NAME = "outcome"


class Outcome:
    """Written once: the first verdict is the cause, what follows it on other ranks are consequences."""

    def __init__(self) -> None:
        named = os.environ.get(VARIABLE)
        self._paths = [Path(named)] if named else []
        self._check: Callable[[], None] | None = None

    def clear_named(self) -> None:
        """Remove the job's own file.  For the main rank, first thing."""
        for path in self._paths:
            path.unlink(missing_ok=True)

    def in_run(self, run: Path, check: Callable[[], None]) -> None:
        """From now on also into the run's folder, and nowhere once `check` raises RunTakenOverError: then what becomes
        of the run is for the start to say that holds it."""
        self._paths.append(run / NAME)
        self._check = check

    def write(self, verdict: Verdict, reason: str) -> None:
        """Leave the verdict; does nothing where there is one.  Never raises: it is the last thing a process does."""
        try:
            if self._check is not None:
                self._check()
        except UserError:
            return
        line = f"{verdict} {' '.join(reason.split())}\n"
        for path in self._paths:
            with suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("x", encoding="utf-8") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())

    def write_in_time(self, verdict: Verdict, reason: str, seconds: float = 5.0) -> None:
        """`write` by a process that must end: a file system that hangs, perhaps the very cause, must not keep it."""
        thread = threading.Thread(target=self.write, args=(verdict, reason), daemon=True)
        thread.start()
        thread.join(seconds)


def exit_code(outcome: tuple[Verdict, str] | None, launcher: int) -> int:
    """What the command that started a run's processes ends with: 0, 1, 2 or 75.

    outcome: of this start, None where it died without a word.  launcher: its launcher's exit code, which loses the
    ranks' (247 for one that was killed), but tells a mistake from what else failed.
    """
    if outcome is not None and outcome[0] != "failed":
        return EXIT_CODES[outcome[0]]
    if launcher in ((0, 1, 2) if outcome is None else (1, 2)):
        return launcher
    return EXIT_CODES["requeue" if outcome is None else "failed"]


def read(path: Path) -> tuple[Verdict, str] | None:
    """Verdict and reason; None where there is no such file or it says nothing known."""
    try:
        word, _, reason = path.read_text(encoding="utf-8").strip().partition(" ")
    except (OSError, ValueError):
        return None
    return next(((verdict, reason) for verdict in get_args(Verdict) if verdict == word), None)
