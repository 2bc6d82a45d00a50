"""requirements-lock.txt: one release of everything that an installation has, as this environment holds them.

`python -m tests.offline.lock --write` writes it anew, from an environment in which `make install` has chosen.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements-lock.txt"
PYTHONS = ("3.11", "3.12")  # that of the tests' environment, and that of the container's base
HEADER = """\
# One release of everything that mirai_ds needs, for Python 3.11 and 3.12 on Linux (x86-64): those of the environment in
# which the tests pass.  pip install --no-deps -r requirements-lock.txt; docs/offline.md has other environments.
# Written by `python -m tests.offline.lock --write`; pyproject.toml has the ranges.
"""


def project_requirements() -> list[Requirement]:
    """`dependencies` of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    return [Requirement(line) for line in re.findall(r'^ +"([^"]+)"', block[1], re.MULTILINE)]


def read_lock(path: Path = LOCK) -> dict[str, str]:
    """Canonical name -> version.  Raises ValueError for a line that is no pin."""
    pins = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!+]+)", line)
            if match is None:
                raise ValueError(f"{path.name}: {line!r} is no NAME==VERSION")
            pins[canonicalize_name(match[1])] = match[2]
    return pins


def needed_by(requirement: Requirement, python: str) -> Iterator[Requirement]:
    """What the installed distribution of `requirement` needs for that Python on Linux, with the extras asked for."""
    environment = {"python_version": python, "python_full_version": f"{python}.7", "sys_platform": "linux",
                   "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix",
                   "platform_python_implementation": "CPython", "implementation_name": "cpython"}  # fmt: skip
    for text in metadata.distribution(requirement.name).requires or ():
        needed = Requirement(text)
        extras = ["", *requirement.extras]
        if needed.marker is None or any(needed.marker.evaluate({**environment, "extra": extra}) for extra in extras):
            yield needed


def closure(python: str) -> dict[str, list[Requirement]]:
    """Canonical name -> every requirement on it, from the project's own down to the last."""
    found: dict[str, list[Requirement]] = {}
    waiting, seen = project_requirements(), set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        found.setdefault(name, []).append(requirement)
        if (name, tuple(sorted(requirement.extras))) not in seen:
            seen.add((name, tuple(sorted(requirement.extras))))
            waiting += needed_by(requirement, python)
    return found


def main(argv: list[str] | None = None) -> int:
    """Print the lock, or write it."""
    parser = argparse.ArgumentParser(prog="python -m tests.offline.lock", description=__doc__)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(argv)
    names = sorted({name for python in PYTHONS for name in closure(python)})
    # Of torch 2.14.1+cu130 the published file is called 2.14.1.
    lines = [f"{name}=={metadata.version(name).partition('+')[0]}" for name in names]
    text = HEADER + "\n".join(lines) + "\n"
    if args.write:
        LOCK.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
