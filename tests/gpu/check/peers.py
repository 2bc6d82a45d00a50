"""Races: the authors' and LlamaGen's own training loops beside this trainer, on one GPU, in turns.

python -m tests.gpu.check.peers FOLDER GROUP

FOLDER holds the checkouts Mirai (y0urOy/Mirai-Code, 4e8611e) and LlamaGen (FoundationVision/LlamaGen, ce98ec4).  Each
arm is a process.  Their loops run with their own model, loss, optimizer, average and refresh, compiled as their scripts
compile, on random codes that are there already; so do ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from mirai_ds.benchmarks.arms import BenchArm, Workers
from tests.gpu.check.native_rows import Row, one

PEER = "tests.gpu.check.peer_loops"
RECIPES = {"none": "llamagen-{}", "E": "mirai-e-{}"}
OURS = {
    "ZeRO-0, compile `blocks`": ("deepspeed=zero0", "train.compile=blocks"),
    "ZeRO-2, compile `blocks`": ("deepspeed=zero2", "train.compile=blocks"),
    "as shipped: ZeRO-2, compile `none`": ("deepspeed=zero2", "train.compile=none"),
}
GROUPS = {
    "B32": ("GPT-B", 32, "E"), "L32": ("GPT-L", 32, "E"), "XL16": ("GPT-XL", 16, "E"), "B128": ("GPT-B", 128, "E"),
    "B32-none": ("GPT-B", 32, "none"),
}  # fmt: skip
TURNS, STEPS, PROFILED, WARM_UP = 3, 15, 3, 6


def arms(folder: Path, size: str, batch: int, method: str, more: list[str]) -> list[BenchArm]:
    """Theirs, compiled and eager, then ours; `more` are settings of ours."""
    recipe = RECIPES[method].format(size.removeprefix("GPT-").lower())
    given = [f"train.global_batch_size={batch}", "train.grad_accum_steps=1", "train.precision=bf16-autocast"]
    given += ["foresight.warmup_epochs=0"] if method != "none" else []
    owner = "LlamaGen" if method == "none" else "Mirai"
    whose = "LlamaGen's loop" if method == "none" else "authors' loop"
    common = {"folder": str(folder), "owner": owner, "size": size, "batch": batch}
    theirs = [
        BenchArm(f"{whose}, {told}", recipe, gpus=1, threads=2, module=PEER, settings=common | {"compiled": compiled})
        for told, compiled in (("compiled as they do", True), ("eager", False))
    ]
    return theirs + [BenchArm(name, recipe, [*given, *sets, *more], gpus=1, threads=2) for name, sets in OURS.items()]


def prepared(arm: BenchArm) -> Workers | None:
    """Built and warm; None where it cannot be: the others race without it."""
    workers = Workers(arm)
    try:
        for _ in range(WARM_UP):
            workers.ask("step")
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return None
    return workers


def asked(workers: Workers, command: str) -> dict[str, Any]:
    """An arm's answer; nothing where it has died."""
    try:
        return workers.ask(command)[0]
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return {}


def race(entries: list[BenchArm], turns: int, steps: int, profiled: int) -> Iterator[tuple[BenchArm, dict[str, Any]]]:
    """Each arm with its median seconds a step, what the device did and its peak memory; all are built at once."""
    with ThreadPoolExecutor(len(entries)) as pool:
        built = list(pool.map(prepared, entries))
    running = [(arm, workers) for arm, workers in zip(entries, built, strict=True) if workers is not None]
    try:
        times: dict[str, list[float]] = {arm.name: [] for arm, _ in running}
        for turn in range(turns):
            for arm, workers in running[:: -1 if turn % 2 else 1]:
                times[arm.name] += [found["seconds"] for found in [asked(workers, f"run {steps}")] if found]
        for arm, workers in running:
            if times[arm.name]:
                seconds = statistics.median(times[arm.name])
                more = asked(workers, f"profile {profiled}") if profiled else {}
                yield arm, {"seconds": seconds, **more, **asked(workers, "memory")}
    finally:
        for _, workers in running:
            with suppress(OSError):
                workers.close()


def rows(arm: BenchArm, found: dict[str, Any], size: str, batch: int, method: str) -> Iterator[Row]:
    """In the form of the results."""
    about = {"model": size, "method": method, "batch": str(batch), "precision": "bf16-autocast", "variant": arm.name}
    yield one("train step", "step", f"{1e3 * found['seconds']:.4g}", "ms", **about)
    if found.get("launches"):  # the profiler saw a GPU
        yield one("train step", "device time", f"{found['busy_ms']:.4g}", "ms", **about)
        yield one("train step", "launches and copies", f"{found['launches']:.0f}", "calls", **about)
        for kind, milliseconds in found["kinds"].items():
            yield one("device time of a step", kind, f"{milliseconds:.3g}", "ms", **about)
    if "peak" in found:
        yield one("train step", "peak memory", f"{found['peak'] / 1e9:.2f}", "GB", **about)


def main(argv: list[str] | None = None) -> int:
    """Print a row a line; 1 where an arm is missing."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check.peers", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("folder", type=Path)
    parser.add_argument("group", choices=list(GROUPS))
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--steps", type=int, default=STEPS, help="in a row (default: %(default)s)")
    parser.add_argument("--profiled", type=int, default=PROFILED, help="steps that are profiled (default: %(default)s)")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="of ours: SECTION.FIELD=VALUE")
    args = parser.parse_args(argv)
    size, batch, method = GROUPS[args.group]
    entries = arms(args.folder.resolve(), size, batch, method, args.settings)
    done = 0
    for arm, found in race(entries, args.turns, args.steps, args.profiled):
        done += 1
        for row in rows(arm, found, size, batch, method):
            print(json.dumps(row), flush=True)
    return 0 if done == len(entries) else 1


if __name__ == "__main__":
    sys.exit(main())
