"""Small faults, planted one at a time in a copy of the tree, and what the suite says of each.

A test that never saw a fault may be one that cannot: here is shown that small mistakes in what decides the numbers do
not pass.  The checkout itself is never changed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("faults.yaml")
FIELDS = ("name", "file", "old", "new", "wrong", "tests")
# What is left out beside pyproject's, as in `make test`: the list's own tests, which fail wherever an entry is planted.
PYTEST = ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--ignore=tests/mutations")
LIMIT_SECONDS = 900.0  # of a fault's own tests
WHOLE_SUITE = 6  # times as long: it is run by one process here
FAILED = 1  # exit code of pytest
_CULPRIT = re.compile(r"^(?:FAILED|ERROR) (\S+?\.py(?:::[^\s\[]+(?:\[.*?\](?= - |$))?)?)", re.MULTILINE)


class StaleListError(Exception):
    """An entry does not fit the sources any more; the message names it."""


@dataclass(frozen=True)
class Fault:
    """old stands exactly once in `file` and becomes new; tests: where it should be caught first."""

    name: str
    file: str
    old: str
    new: str
    wrong: str
    tests: tuple[str, ...]

    def mutated(self, root: Path) -> str:
        """The file's text with the fault.  Raises StaleListError where `old` does not stand in it exactly once."""
        path = root / self.file
        if not path.is_file():
            raise StaleListError(f"{self.name}: there is no {self.file}")
        text = path.read_text(encoding="utf-8")
        found = text.count(self.old)
        if found != 1 or self.new == self.old:
            raise StaleListError(f"{self.name}: its old text stands {found} times in {self.file}, not once")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Verdict:
    """caught: whether a test failed; what: that test, else what happened; seconds: it took."""

    fault: Fault
    caught: bool
    what: str
    seconds: float


def read_list(path: Path = LIST) -> list[Fault]:
    """All faults.  Raises StaleListError for an entry that is not one, or two of a name."""
    faults: list[Fault] = []
    for number, entry in enumerate(yaml.safe_load(path.read_text(encoding="utf-8")), start=1):
        if not isinstance(entry, dict) or set(entry) != set(FIELDS) or not entry["tests"]:
            raise StaleListError(f"entry {number}: needs exactly {', '.join(FIELDS)}")
        if any(fault.name == entry["name"] for fault in faults):
            raise StaleListError(f"{entry['name']}: is there twice")
        faults.append(Fault(**{**entry, "tests": tuple(entry["tests"])}))
    return faults


def check(faults: Sequence[Fault], root: Path = ROOT) -> None:
    """That every entry applies and its tests are there; raises StaleListError with all that do not, a line each."""
    problems = []
    for fault in faults:
        try:
            fault.mutated(root)
        except StaleListError as error:
            problems.append(str(error))
        problems += [f"{fault.name}: there is no {test}" for test in fault.tests if not (root / test).exists()]
    if problems:
        raise StaleListError("\n".join(problems))


@contextmanager
def copied(repository: bool = False) -> Iterator[Path]:
    """A temporary copy of the working tree, without what git ignores; where some test asks git, a repository too."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        # Its name is on the path of every process that a test starts; no test may take it for something else.
        copy = Path(folder) / "tree"
        for name in filter(None, listed.stdout.split("\0")):
            source, target = ROOT / name, copy / name
            if source.is_symlink() or source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)
        if repository:
            me = ("-c", "user.name=nobody", "-c", "user.email=nobody")
            for step in (("init", "-q"), ("add", "-A"), (*me, "commit", "-qm", "copy")):
                subprocess.run(["git", *step], cwd=copy, check=True)
        yield copy


def environment(copy: Path) -> dict[str, str]:
    """In which every process, a test's own ones too, imports the copy and not what is installed."""
    return {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}


def assert_imports(copy: Path) -> None:
    """That a process that starts elsewhere imports the copy; raises RuntimeError."""
    code = "import mirai_ds.kernels, tests; print(mirai_ds.__file__, mirai_ds.kernels.__file__, tests.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=copy.parent, env=environment(copy), capture_output=True, text=True, check=True
    )
    if any(not Path(name).is_relative_to(copy) for name in done.stdout.split()):
        raise RuntimeError(f"tests would import {done.stdout.strip()}, not {copy}")


def run_tests(copy: Path, tests: Sequence[str], limit: float) -> tuple[int | None, str]:
    """pytest's exit code, None where it had to be killed after `limit` seconds, and what it printed."""
    with tempfile.TemporaryFile("w+") as said:  # a pipe would be kept open by whatever a test left behind
        process = subprocess.Popen(
            [sys.executable, *PYTEST, *tests], cwd=copy, env=environment(copy), stdout=said, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        code: int | None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        said.seek(0)
        return code, said.read()


def _end(process: subprocess.Popen[Any]) -> None:
    """The whole group: ranks of a test that was killed too."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def culprit(said: str) -> str:
    """The first test that pytest's summary names."""
    found = _CULPRIT.search(said)
    return found.group(1) if found else ""


def judge(fault: Fault, everything: bool = False, limit: float = LIMIT_SECONDS) -> Verdict:
    """Plant a fault and run its tests, and where none fails and `everything` is asked for the whole fast suite.

    Raises RuntimeError where pytest could not run: an import that fails is no catch.
    """
    began = time.monotonic()
    with copied(everything) as copy:
        (copy / fault.file).write_text(fault.mutated(copy), encoding="utf-8")
        assert_imports(copy)
        for tests in [fault.tests, *[()] * everything]:
            code, said = run_tests(copy, tests, limit if tests else limit * WHOLE_SUITE)
            seconds = time.monotonic() - began
            if code is None:
                # Only a deadline of a test's own is the suite's; this one is not there in `make test`.
                return Verdict(fault, False, f"HUNG: no test's own deadline ended it in {seconds:.0f} s", seconds)
            if code == FAILED:
                return Verdict(fault, True, culprit(said), seconds)
            if code:
                raise RuntimeError(f"{fault.name}: pytest ended with {code}\n{said[-3000:]}")
    return Verdict(fault, False, "MISSED", seconds)


def innocent(tests: Sequence[str], limit: float = LIMIT_SECONDS) -> str:
    """Run the tests that caught something without any fault: "", or what failed, whose catches then mean nothing."""
    with copied(True) as copy:
        code, said = run_tests(copy, sorted(set(tests)), limit)
    if code == 0:
        return ""
    return culprit(said) or f"pytest ended with {code}\n{said[-3000:]}"
