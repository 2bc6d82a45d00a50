"""From `mirai-ds train` to its first step: `python -m mirai_ds.benchmarks.startup [--repeat 3] [--ranks 2]`.

Starts the command itself, in a process of its own, with stamps around its parts on rank 0; the run ends after one step.
The first start of each case warms the file caches and is not counted.  `help` is `mirai-ds --help`.
"""

from __future__ import annotations

import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mirai_ds.benchmarks.harness import append, command_line, facts, new_parser, only_table
from mirai_ds.runtime import markdown

MODULE = "mirai_ds.benchmarks.startup"
FIELDS = ("date", "device", "python", "torch", "cuda", "command", "ranks", "model", "what", "variant", "value", "unit",
          "ratio")  # fmt: skip
STAMPS = "MIRAI_DS_STARTUP_STAMPS"  # file to which stamps are added, one a line
Row = dict[str, str]

# A recipe that needs no data beside the package, and the same at the size of GPT-B (8 images a step).
CASES: dict[str, tuple[str, ...]] = {
    "digits-mirai-e": (),
    "GPT-B sized": (  # without the evaluation that the recipe begins with: two minutes at this size on two cores
        "model.dim=768", "model.n_layer=12", "model.n_head=12", "train.global_batch_size=8",
        "eval.loss.every_steps=null",
    ),
}  # fmt: skip
_DIGITS = ("foresight.warmup_epochs=0", "train.max_steps=1", "eval.classifier.enabled=false")
# Stamp -> what was done before it.
PHASES = {
    "command": "Python, options, recipe",
    "rank": "launcher",
    "imports": "imports of the ranks",
    "group": "process group",
    "folder": "run folder and lock",
    "session": "data, model, engine",
    "preflight": "preflight",
    "step": "first step, evaluation before it",
}


def stamp(name: str) -> None:
    """Notes the time of a phase; only the first rank does."""
    if os.environ.get("RANK", "0") == "0" and STAMPS in os.environ:
        with open(os.environ[STAMPS], "a", encoding="utf-8") as file:
            file.write(json.dumps([name, time.time()]) + "\n")


def _stamped(module: Any, name: str, label: str, last: bool = False) -> None:
    """Replace a function by itself and a stamp; after the last the process is done."""
    function: Callable[..., Any] = getattr(module, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        stamp(label)
        if last:
            os._exit(0)
        return out

    setattr(module, name, run)


def command(arguments: list[str]) -> None:
    """Runs `mirai-ds train ARGUMENTS` with ranks that run `rank`."""
    from mirai_ds.runtime import launch

    start = launch.launch

    def stamped_launch(module: str, passed: list[str], *args: Any) -> int:
        stamp("command")
        return start(MODULE, ["--rank", *passed], *args)

    launch.launch = stamped_launch  # type: ignore[assignment]
    sys.argv = ["mirai-ds", "train", *arguments]
    runpy.run_module("mirai_ds", run_name="__main__")


def rank(arguments: list[str]) -> None:
    """Runs `python -m mirai_ds.train ARGUMENTS` and stamps its phases."""
    stamp("rank")
    from mirai_ds.train import __main__ as train

    read = train.recognise

    def first(*args: Any) -> Any:  # what `Start.train` imports, in its order
        os.environ.setdefault("DS_ACCELERATOR", "cpu") if not Path("/dev/nvidia0").exists() else None
        from mirai_ds.engine import start
        from mirai_ds.train import build, loop, preflight, run_folder
        from mirai_ds.train.hooks import registry

        assert registry
        stamp("imports")
        _stamped(start, "start_process_group", "group")
        _stamped(run_folder.RunFolder, "open", "folder")
        _stamped(build, "build_session", "session")
        _stamped(preflight, "preflight", "preflight")
        _stamped(loop, "train_step", "step", last=True)
        return read(*args)

    train.recognise = first  # type: ignore[assignment]
    train.main(arguments)


def one_start(overrides: Sequence[str], ranks: int) -> dict[str, float]:
    """Seconds of each phase of one start, by stamp.  Raises RuntimeError with the output of one that failed."""
    with tempfile.TemporaryDirectory() as folder:
        sets = [part for o in (*_DIGITS, *overrides) for part in ("--set", o)]
        arguments = ["digits-mirai-e", "--ranks", str(ranks), "--run-dir", f"{folder}/run", *sets]
        stamps = Path(folder, "stamps")
        began = time.time()
        done = subprocess.run(
            [sys.executable, "-m", MODULE, "--command", *arguments], env={**os.environ, STAMPS: str(stamps)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        reached = dict(map(json.loads, stamps.read_text("utf-8").splitlines())) if stamps.exists() else {}
    if list(reached) != list(PHASES):
        raise RuntimeError(f"a start ended after {list(reached)}:\n{done.stdout}{done.stderr}")
    times = [began, *reached.values()]
    return {name: after - before for name, before, after in zip(reached, times, times[1:], strict=False)}


def help_seconds() -> float:
    """Seconds that `mirai-ds --help` takes."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "mirai_ds", "--help"], check=True, capture_output=True)
    return time.perf_counter() - began


def measure(
    ranks: int = 2, repeat: int = 3, told: str = f"python -m {MODULE}", cases: Sequence[str] = tuple(CASES)
) -> list[Row]:
    """Rows: median seconds of every phase and of the whole, its ratio to the whole; `help`.  told: the command that a
    row is to name."""
    import torch

    about = {**facts("cuda" if torch.cuda.is_available() else "cpu", told), "ranks": str(ranks)}

    def row(model: str, variant: str, seconds: float, ratio: float | None) -> Row:
        return {**about, "model": model, "what": "start to step 1" if ratio is not None else "--help",
                "variant": variant, "value": f"{seconds:.3g}", "unit": "s",
                "ratio": "" if ratio is None else f"{ratio:.3f}"}  # fmt: skip

    rows = []
    for model, overrides in ((name, CASES[name]) for name in cases):
        one_start(overrides, ranks)
        starts = [one_start(overrides, ranks) for _ in range(repeat)]
        whole = statistics.median(sum(start.values()) for start in starts)
        rows.append(row(model, "all", whole, 1.0))
        for name, text in PHASES.items():
            seconds = statistics.median(start[name] for start in starts)
            rows.append(row(model, text, seconds, seconds / whole))
    help_seconds()
    rows.append(row("", "mirai-ds --help", statistics.median(help_seconds() for _ in range(repeat)), None))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = []
    for r in rows:
        layout = f"{r['ranks']}, {r['model']}" if r["model"] else "-"
        share = f"{float(r['ratio']):.0%}" if r["ratio"] else "-"
        lines.append(f"{r['device']} | {layout} | {r['what']} | {r['variant']} | {r['value']} | {share}")
    return markdown.table("device | ranks, model | what | part | seconds | of the whole", lines, "llllrr")


def main(argv: list[str] | None = None) -> int:
    """Measure, print, append to the results; or be one of the processes measured."""
    argv = sys.argv[1:] if argv is None else argv
    for flag, run in (("--command", command), ("--rank", rank)):
        if argv[:1] == [flag]:
            run(argv[1:])
            return 0
    parser = new_parser("startup", __doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="starts of each case that count")
    parser.add_argument("--case", action="append", choices=CASES, help="repeatable; default all")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args(argv)
    if only_table(args, table, FIELDS):
        return 0
    rows = measure(
        args.ranks, args.repeat, command_line(f"python -m {MODULE}", argv, [args.out]), args.case or tuple(CASES)
    )
    print(json.dumps(rows, indent=1) if args.json else table(rows), flush=True)
    append(args.out, FIELDS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
