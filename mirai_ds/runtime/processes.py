"""Processes by more than their number, which is used again; and an end for one whose starter is gone."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PARENT = "MIRAI_DS_PARENT"  # names the process that started this one's launcher: pid and start time
# What torchrun and deepspeed's launcher set.  Under these a rank's parent lives as long as the ranks do; a shell's `&`
# has no such duty, and srun's and mpirun's daemons end their ranks themselves.
_LAUNCHERS = (PARENT, "TORCHELASTIC_RUN_ID", "CROSS_SIZE")
LOOK_SECONDS = 1.0


def start_time(pid: int) -> str:
    """When a living process began, in clock ticks; empty when there is none (a dead one that nobody has waited for
    counts as none)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return ""


def pid_space() -> str:
    """Where this process's number means something: the boot of the machine and the namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


@dataclass(frozen=True)
class Identity:
    """A process for others to look up."""

    host: str
    space: str
    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> Identity:
        """Of a process of this machine."""
        return cls(socket.gethostname(), pid_space(), pid, start_time(pid))

    def is_gone(self) -> bool:
        """Whether it has certainly ended: False for one of another machine."""
        return bool(self.started) and self.space == pid_space() and start_time(self.pid) != self.started


def as_parent() -> dict[str, str]:
    """The variable that ties processes to this one; for their environment."""
    return {PARENT: f"{os.getpid()} {start_time(os.getpid())}"}


def tie_to_starter() -> Callable[[], None]:
    """For `Popen(preexec_fn=...)` of a launcher: it is killed when the thread that starts it ends, by whatever signal,
    even while it imports (prctl(2), PR_SET_PDEATHSIG).  Its ranks are left to `watch_starter`.  Linux only; does
    nothing elsewhere."""
    starter, prctl = os.getpid(), getattr(ctypes.CDLL(None), "prctl", None)

    def tie() -> None:
        if prctl is not None:
            prctl(1, signal.SIGKILL)
            if os.getppid() != starter:  # it ended in between
                os._exit(1)

    return tie


def watch_starter(on_gone: Callable[[str], None]) -> None:
    """From a thread, once: call `on_gone(text)` when this process's launcher, or whoever started that, has ended, by
    whatever signal.  Does nothing where nobody has to live for this process."""
    if not any(name in os.environ for name in _LAUNCHERS):
        return
    pid, _, started = os.environ.get(PARENT, "").partition(" ")
    named = [Identity(socket.gethostname(), pid_space(), int(pid), started)] if pid.isdigit() else []
    parent = os.getppid()

    def look() -> None:
        while True:
            gone = next((one.pid for one in named if one.is_gone()), None if os.getppid() == parent else parent)
            if gone is not None:
                on_gone(f"process {gone}, which started this one, is gone")
                return
            time.sleep(LOOK_SECONDS)

    threading.Thread(target=look, daemon=True, name="starter").start()
