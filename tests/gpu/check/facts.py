"""Where results come from: card, driver, versions, commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from tests.gpu.check.native_rows import FAKE, Row

ROOT = Path(__file__).resolve().parents[3]
# In a process of its own: a CUDA context here would take memory from the steps, and a broken one could end the whole.
_CARD = (
    "import json, torch; there = torch.cuda.is_available(); "
    "print(json.dumps({'torch': torch.__version__, 'card': torch.cuda.get_device_name(0) if there else ''}))"
)


def where() -> Row:
    """Of this machine; `card` is empty where torch sees no GPU."""
    found = {"torch": "missing", "card": ""}
    done = subprocess.run([sys.executable, "-c", _CARD], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if lines:
        found |= json.loads(lines[-1])
    return {
        "date": time.strftime("%Y-%m-%d"), "card": found["card"], "driver": driver(), "torch": found["torch"],
        "deepspeed": version("deepspeed"), "python": platform.python_version(), "commit": commit(),
        "fake": FAKE in found["card"],
    }  # fmt: skip


def version(package: str) -> str:
    """Installed version, or `missing`."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def driver() -> str:
    """The driver's version, as nvidia-smi or the kernel module says it; empty where neither does."""
    told = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if told:
        return told.splitlines()[0].strip()
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
    except OSError:
        return ""
    return next((word for word in words if word[0].isdigit() and "." in word), "")


def commit() -> str:
    """Seven digits of the commit, `+changes` behind it where files were edited; $COMMIT where git is not."""
    if given := os.environ.get("COMMIT"):
        return given
    found = output("git", "-C", str(ROOT), "rev-parse", "--short=7", "HEAD")
    if not found:
        return "unknown"
    return found + ("+changes" if output("git", "-C", str(ROOT), "status", "--porcelain") else "")


def output(*command: str) -> str:
    """What a command prints; empty where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
