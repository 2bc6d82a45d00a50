"""Runs steps as processes of their own: a failure, a hang or a crash of one is a verdict and stops no other."""

from __future__ import annotations

import glob
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.gpu.check import results as verdicts
from tests.gpu.check.facts import ROOT
from tests.gpu.check.native_rows import READERS, Row
from tests.gpu.check.results import Results
from tests.gpu.check.slices import SLICE_SECONDS, Slice, Step

GRACE = 5.0  # seconds between asking a step to end and ending it
LEAST = 5.0  # seconds that must be left for a step to be started


class Runner:
    """Runs slices into `results`.  again: also what has passed.  seconds: a slice's time."""

    def __init__(self, results: Results, again: bool = False, seconds: float = SLICE_SECONDS) -> None:
        self.results, self.again, self.seconds = results, again, seconds
        self._alive: set[subprocess.Popen[bytes]] = set()

    def run(self, slices: Iterable[Slice]) -> bool:
        """Whether nothing failed.  A signal that asks this process to end ends what it has started first."""
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(self.stop()))
        try:
            for piece in slices:
                print(f"slice {piece.number}: {piece.name}", flush=True)
                self._slice(piece)
        finally:
            self.stop()
            shutil.rmtree(self.results.running, ignore_errors=True)
            signal.signal(signal.SIGTERM, before)
        good = (verdicts.PASSED, verdicts.SKIPPED)
        asked = {key_of(piece, step) for piece in slices for step in piece.steps}
        return all(found["verdict"] in good for key, found in self.results.steps.items() if key in asked)

    def stop(self) -> int:
        """End what runs; the exit code of a process that was asked to end."""
        for process in list(self._alive):
            end(process, 0.0)
        return 143

    def _slice(self, piece: Slice) -> None:
        until = time.monotonic() + self.seconds
        for _, steps in groupby(piece.steps, lambda step: step.group or step.name):
            together = list(steps)
            with ThreadPoolExecutor(len(together)) as pool:
                list(pool.map(lambda step: self._guarded(piece, step, until), together))

    def _guarded(self, piece: Slice, step: Step, until: float) -> None:
        """A mistake of this program itself must not stop the other steps either."""
        key = key_of(piece, step)
        try:
            if not self.again and self.results.passed(key):
                print(f"  {key}: has passed before", flush=True)
                return
            found, rows, log = self._step(piece, step, until)
        except Exception as error:
            found, rows, log = verdict(verdicts.FAILED, 0.0, f"gpu-check itself: {error!r}"), [], None
        self.results.add(key, found, rows, log)
        why = f" ({found['why']})" if found["why"] else ""
        print(f"  {key}: {found['verdict']} in {found['seconds']:.0f} s, {len(rows)} rows{why}", flush=True)

    def _step(self, piece: Slice, step: Step, until: float) -> tuple[dict[str, Any], list[Row], Path | None]:
        left = until - time.monotonic()
        if step.needs and shutil.which(step.needs) is None:
            return verdict(verdicts.SKIPPED, 0.0, f"no {step.needs} here"), [], None
        if step.variable and not os.environ.get(step.variable):
            return verdict(verdicts.SKIPPED, 0.0, f"{step.variable} is not set"), [], None
        if left < LEAST:
            return verdict(verdicts.NOT_RUN, 0.0, "the slice's time was over: start it again"), [], None
        name = f"{piece.number}-{step.name}".replace(" ", "-").replace(",", "")
        base = self.results.running / name
        rows_file, log = base.with_suffix(".rows"), self.results.running / f"{name}.log"
        base.mkdir(exist_ok=True)
        began = time.monotonic()
        limit = min(step.limit, left)
        code = self._process(words(step, rows_file, base), dict(step.environment), log, limit)
        seconds = time.monotonic() - began
        text = log.read_text(encoding="utf-8", errors="replace")
        try:
            found = list(READERS[step.reader](rows_file, text)) if step.reader else []
            trouble = ""
        except Exception as error:
            found, trouble = [], f"its rows cannot be read: {error!r}"
        told = [self.results.row(told_command(step), f"{piece.number} {piece.name}", row) for row in found]
        shutil.rmtree(base, ignore_errors=True)
        rows_file.unlink(missing_ok=True)
        if code is None:
            return verdict(verdicts.KILLED, seconds, f"not done after {limit:.0f} s"), told, log
        if code != 0 or trouble:
            return verdict(verdicts.FAILED, seconds, trouble or last_words(code, text), code), told, log
        return verdict(verdicts.PASSED, seconds, "", code), told, log

    def _process(self, command: list[str], environment: dict[str, str], log: Path, limit: float) -> int | None:
        """The exit code; None when it was ended at its limit."""
        port = {"MASTER_PORT": str(free_port()), "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as file:
            file.write(f"$ {' '.join(command)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **port, **environment}, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            self._alive.add(process)
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                return None
            finally:
                end(process, GRACE)  # also what a finished step has left behind
                self._alive.discard(process)


def end(process: subprocess.Popen[bytes], grace: float) -> None:
    """End a process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        if number == signal.SIGTERM and process.poll() is None:
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                continue
    process.wait()
    wait_until_empty(process.pid, GRACE)


def wait_until_empty(group: int, limit: float) -> None:
    """Wait until no process of a group is left: a killed one still holds its GPU's memory for a moment.

    `limit` is in seconds; a process that nobody reaps stays in the group for ever, and a step must not wait for that.
    """
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(0.02)


def verdict(word: str, seconds: float, why: str, code: int | None = None) -> dict[str, Any]:
    """A step's entry in the summary."""
    return {"verdict": word, "seconds": round(seconds, 1), "why": why, "code": code}


def key_of(piece: Slice, step: Step) -> str:
    """A step's name in the summary."""
    return f"{piece.number} {step.name}"


def words(step: Step, rows: Path, folder: Path) -> list[str]:
    """The command with its blanks filled in and its patterns expanded; an unknown blank raises KeyError."""
    blanks = {"python": sys.executable, "rows": rows, "folder": folder, "peers": os.environ.get("PEERS", "")}
    found: list[str] = []
    for word in step.command:
        filled = word.format(**blanks)
        found += sorted(glob.glob(filled, root_dir=ROOT)) or [filled] if "*" in word else [filled]
    return found


def told_command(step: Step) -> str:
    """The command as a row says it: nothing in it differs from machine to machine."""
    blanks = {"python": "python", "rows": "ROWS", "folder": "FOLDER", "peers": "PEERS"}
    return " ".join(word.format(**blanks) for word in step.command)


def last_words(code: int, text: str) -> str:
    """Why a step failed, in a line: the last one that names an error, else its last one."""
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or " failed" in line]
    return f"exit code {code}: {(errors or lines or ['it said nothing'])[-1][:160]}"


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
