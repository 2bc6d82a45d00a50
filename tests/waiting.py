"""Waiting for what another process or thread does: however slow the machine is, and not for ever."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(what: str, holds: Callable[[], object], seconds: float = 300.0) -> None:
    """Until `holds()`; otherwise the test fails with `what` was waited for."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"waited {seconds:.0f} s in vain: {what}"
        time.sleep(0.02)
