"""What all benchmarks share: their options, where a row comes from, the results file, clocks and memory.

A results file is CSV whose first line names the columns.  It is written where the user says, or in the current folder.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mirai_ds.config import UserError
from mirai_ds.runtime.disk import replacing


def new_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of `mirai-ds bench NAME` with the options of every benchmark: `--out` (default `bench-NAME.csv` in the
    current folder) and `--table`."""
    parser = argparse.ArgumentParser(
        f"mirai-ds bench {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(f"bench-{name}.csv")
    parser.add_argument("--out", type=Path, default=default, help="CSV file to add rows to (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="print the rows of --out as Markdown; measure nothing")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`, by default the GPU where there is one."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")


def only_table(args: argparse.Namespace, table: Callable[[list[dict[str, str]]], str], columns: Sequence[str]) -> bool:
    """With `--table` print the rows that are there.  Without it nothing, but a file that rows with these columns could
    not be added to is refused before anything is measured.  Raises UserError."""
    if args.table:
        if not args.out.is_file():
            raise UserError(f"--out {args.out}: no such file; a benchmark without --table writes it")
        print(table(read(args.out)))
    else:
        check_output(args.out, columns)
    return bool(args.table)


def check_output(path: Path, columns: Sequence[str]) -> None:
    """Raises UserError where `path` cannot be written, or holds rows of another benchmark."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--out {path}: is a folder, or in one that is missing or cannot be written; give another name")
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), None)
        if header is not None and header != list(columns):
            raise UserError(f"--out {path}: holds rows with other columns; give another name")


def command_line(command: str, argv: Sequence[str], places: Sequence[Path | None]) -> str:
    """The command that a row names, with its words but for `places`, where results and runs go."""
    left_out = {"--out", "--run-dir", *(str(place) for place in places if place is not None)}
    return " ".join([command, *(word for word in argv if word not in left_out)])


def read(path: Path) -> list[dict[str, str]]:
    """Reads the rows of a results file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, fields: Sequence[str], rows: Sequence[Mapping[str, Any]], key: Sequence[str] = ()) -> None:
    """Add rows.  With `key`, columns, they take the place of earlier rows that have the same values there."""
    new = [{name: str(row.get(name, "")) for name in fields} for row in rows]
    replaced = {tuple(row[name] for name in key) for row in new} if key else set()
    kept = read(path) if path.is_file() else []
    kept = [row for row in kept if tuple(row[name] for name in key) not in replaced]
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows([*kept, *new])


def facts(device: str, command: str) -> dict[str, str]:
    """The columns that say where a row comes from."""
    from mirai_ds.runtime.environment import cpu_name

    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "date": time.strftime("%Y-%m-%d"), "device": name, "python": platform.python_version(),
        "torch": torch.__version__, "cuda": (torch.version.cuda or "") if device == "cuda" else "", "command": command,
    }  # fmt: skip


def milliseconds(runs: dict[str, Callable[[], Any]], rounds: int, repeat: int = 5) -> dict[str, float]:
    """Median time of each on the CPU, taking turns of `repeat` runs.  The first of a turn is not counted: it pays for
    the memory that the variant before gave back to the operating system."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            for j in range(repeat):
                began = time.perf_counter()
                run()
                if i > 0 and j > 0:
                    times[name].append((time.perf_counter() - began) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def queued_milliseconds(runs: dict[str, Callable[[], Any]], rounds: int, repeat: int = 10) -> dict[str, float]:
    """The same on a GPU, by its own clock: `repeat` runs queued behind each other, so that launching costs nothing.
    The inputs exceed the L2 cache at all sizes but B, I in bf16, which keeps part of them from run to run."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 2):
        for name, run in runs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(100_000_000)  # some 50 ms, in which the queue fills
            start.record()
            for _ in range(repeat):
                run()
            end.record()
            torch.cuda.synchronize()
            if i >= 2:
                times[name].append(start.elapsed_time(end) / repeat)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_extra_bytes(run: Callable[[], Any], device: str) -> int:
    """The most memory in bytes that one run holds beyond what was held before it."""
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del kept
        return peak
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()
    del kept
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def restart_as_training_runs(module: str) -> None:
    """Replace this process by one with the memory settings of training on a CPU, unless it has them."""
    from mirai_ds.runtime.launch import CPU_MEMORY

    if not torch.cuda.is_available() and not CPU_MEMORY.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], {**CPU_MEMORY, **os.environ})
