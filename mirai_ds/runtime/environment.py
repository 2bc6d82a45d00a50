"""What a run ran on, stored with it: versions, devices, code state, command."""

from __future__ import annotations

import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mirai_ds.version import __version__

PACKAGES = (
    "torch", "deepspeed", "timm", "pydantic", "tensorboard", "numpy", "ninja", "scikit-learn", "safetensors",
    "torch-fidelity",
)  # fmt: skip


def package_versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Installed versions of what decides numbers; `missing` for those that are not there."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    return versions


@cache
def code_version() -> str:
    """The git commit of the source tree with `+changes` when it was edited; the package version outside git.

    Asked once a process: what it runs was read when it started, and a checkpoint need not wait for git.
    """
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return __version__
    try:
        run = lambda *args: subprocess.run(  # noqa: E731
            ["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return run("rev-parse", "HEAD") + ("+changes" if run("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return __version__


def cpu_name() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe(world_size: int) -> dict[str, Any]:
    """A JSON-ready record of the environment."""
    cuda = torch.cuda.is_available()
    return {
        "mirai_ds": __version__,
        "code": code_version(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda,
        "world_size": world_size,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
