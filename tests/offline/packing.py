"""What bundles share: wheels for another machine's Python, the files of this checkout, the tar."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Of glibc 2.28, which every machine has that torch's own wheels are for, and of the older ones.
MANYLINUX = (
    *(f"manylinux_2_{release}" for release in range(28, 4, -1)),
    "manylinux2014",
    "manylinux2010",
    "manylinux1",
)


def pip(*words: str) -> None:
    """Raises CalledProcessError with pip's own words above it."""
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, env={**os.environ, "DS_BUILD_OPS": "0"})


def download(requirements: Iterable[str], into: Path, python: str) -> None:
    """Wheels as they are published for `python` on Linux (x86-64), and nothing that they need."""
    platforms = [word for tag in MANYLINUX for word in ("--platform", f"{tag}_x86_64")]
    pip("download", "-q", "--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp",
        *platforms, "-d", str(into), *requirements)  # fmt: skip


def build(source: str, into: Path) -> None:
    """A wheel of a source distribution, with the tools of this environment."""
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(into), source)


def build_project(into: Path) -> None:
    """This checkout's wheel, from a copy: a build leaves files in its sources, and takes those of the one before."""
    with tempfile.TemporaryDirectory() as folder:
        for name in project_files():
            copy = Path(folder) / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy, follow_symlinks=False)
        build(folder, into)


def project_files() -> list[str]:
    """Tracked files, and new ones that git does not ignore."""
    told = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return [name for name in told.split("\0") if name and os.path.lexists(ROOT / name)]


def add_project(archive: tarfile.TarFile, into: str) -> None:
    """This checkout's files, below the folder `into` of the tar."""
    for name in project_files():
        archive.add(ROOT / name, f"{into}/{name}", recursive=False)


def add_script(archive: tarfile.TarFile, name: str, text: str) -> None:
    """An executable file that is nowhere on disk."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(text.encode()), 0o755
    archive.addfile(entry, io.BytesIO(text.encode()))


def listed(paths: Iterable[Path]) -> list[str]:
    """A line each, with its size."""
    return [f"  {path.name}: {path.stat().st_size / 2**20:.2f} MiB" for path in paths]
