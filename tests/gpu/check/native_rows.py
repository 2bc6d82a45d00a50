"""Rows of benchmarks, tests and commands in one form: what was measured, on what, one value a row.

Only the standard library: on a bare machine rows must be written even where nothing else works.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ABOUT = ("date", "card", "driver", "torch", "deepspeed", "commit", "command", "slice")
WHAT = ("subject", "model", "method", "batch", "precision", "variant", "metric", "value", "unit")
COLUMNS = ABOUT + WHAT
FAKE = "(fake)"  # in the name of a device that computes nothing real
Row = dict[str, Any]


def one(subject: str, metric: str, value: object, unit: str = "", **more: object) -> Row:
    """A row without the columns that say where; those not given are empty."""
    return dict.fromkeys(WHAT, "") | {"subject": subject, "metric": metric, "value": value, "unit": unit} | more


def tables(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file; none when it was not written."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def several(about: Row, values: dict[str, tuple[object, str]]) -> Iterator[Row]:
    """A row for each value that is there, of what `about` says."""
    for metric, (value, unit) in values.items():
        if value not in ("", None):
            yield about | {"metric": metric, "value": value, "unit": unit}


def step_rows(path: Path, log: str) -> Iterator[Row]:
    """`mirai-ds bench step`."""
    for r in tables(path):
        about = one("train step", "", "", model=r["model"], method=r["method"], batch=r["batch"],
                    precision=r["precision"], variant=f"{r['comparison']}: {r['variant']}")  # fmt: skip
        yield from several(about, {
            "step": (f"{1e3 * float(r['median_s']):.4g}", "ms"), "times as fast": (r["times_as_fast"], "x"),
            "peak memory": (r["memory_gb"], "GB"), "states": (r["states_gb"], "GB"), "mfu": (r["mfu"], ""),
            "last loss": (r["last_loss"], "nats"),
        })  # fmt: skip


def kernel_rows(path: Path, log: str) -> Iterator[Row]:
    """`mirai_ds.benchmarks.kernels` and `mirai_ds.benchmarks.traffic`, which share a form."""
    for r in tables(path):
        ours = r["op"] == "foresight_cosine"
        about = one(r["op"], "", "", model=f"GPT-{r['size']}", method=r["method"], batch=r["batch"],
                    precision=r["dtype"], variant=r["variant"])  # fmt: skip
        yield from several(about, {"time": (r["median_ms"], "ms"), "ratio": (r["ratio"], "x")})
        if ours:
            yield from several(about, {
                "traffic": (r["gb_per_s"], "GB/s"), "extra memory": (r["extra_mib"], "MiB"),
                "gradient": (r["gradient_mib"], "MiB"),
            })  # fmt: skip


def sampling_rows(path: Path, log: str) -> Iterator[Row]:
    """`mirai_ds.benchmarks.sampling`."""
    for r in tables(path):
        about = one("sampling", "", "", model=r["model"], batch=r["batch"], precision=r["dtype"], variant=r["variant"])
        seconds = float(r["ms_step"]) * int(r["tokens"])
        yield from several(about, {"batch": (f"{seconds:.4g}", "ms"), "speed": (r["images_per_s"], "images/s")})


def extract_rows(path: Path, log: str) -> Iterator[Row]:
    """`mirai_ds.benchmarks.data`."""
    for r in tables(path):
        about = one(r["task"], "", "", variant=r["variant"])
        yield from several(about, {"speed": (r["value"], r["unit"]), "ratio": (r["ratio"], "x")})


def safety_rows(path: Path, log: str) -> Iterator[Row]:
    """`mirai_ds.benchmarks.safety`."""
    for r in tables(path):
        yield one(r["what"], "cost", r["value"], r["unit"], model=r["model"], variant=r["variant"])


def memory_rows(path: Path, log: str) -> Iterator[Row]:
    """`mirai_ds.benchmarks.memory`."""
    for r in tables(path):
        layout = f"ZeRO-{r['zero_stage']}, recompute {r['recompute']}"
        about = one("memory", "", "", model=r["model"], method=r["method"], batch=r["micro_batch"],
                    precision=r["precision"], variant=layout)  # fmt: skip
        yield from several(about, {
            "measured": (r["measured_mb"], "MB"), "planned": (r["planned_mb"], "MB"),
            "error": (r["error_percent"], "%"),
        })  # fmt: skip


def junit_rows(path: Path, log: str) -> Iterator[Row]:
    """pytest's: how many passed, failed and were skipped."""
    if not path.is_file():
        return
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    count = {name: sum(int(s.get(name) or 0) for s in suites) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    found = {"passed": count["tests"] - failed - count["skipped"], "failed": failed, "skipped": count["skipped"]}
    case = next((c for s in suites for c in s.iter("testcase")), None)
    name = "" if case is None else str(case.get("classname") or "").rpartition(".")[2]
    for metric, value in found.items():
        yield one("tests", metric, value, "tests", variant=name)


def line_rows(path: Path, log: str) -> Iterator[Row]:
    """Programs of this folder: each line of their output that is a JSON object with a metric is a row."""
    for line in log.splitlines():
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if "metric" in found:
                yield one(found.pop("subject"), found.pop("metric"), found.pop("value"), **found)


def run_rows(path: Path, log: str) -> Iterator[Row]:
    """A run's last logged metrics; `path` is the rows file beside the run's folder."""
    metrics = path.with_suffix("") / "run" / "metrics.jsonl"
    if not metrics.is_file():
        return
    last = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line.strip()]
    logged = next((r for r in reversed(last) if "loss/total" in r), {})
    for name, unit in (("loss/total", "nats"), ("speed/images_per_s", "images/s")):
        if name in logged:
            yield one("demo", name, logged[name], unit, model="digits", method="E")


def verdict_rows(path: Path, log: str) -> Iterator[Row]:
    """What a command says at its end in numbers that are worth a row."""
    for pattern, subject, metric, unit in (
        (r"(\d+) kernels for .*: \d+ use local memory", "registers", "kernels", "kernels"),
        (r"\d+ kernels for .*: (\d+) use local memory", "registers", "spilled", "kernels"),
        (r"(\d+) forward and backward passes", "sanitizer", "passes", "passes"),
        (r"ERROR SUMMARY: (\d+) error", "sanitizer", "errors", "errors"),
        (r"RACECHECK SUMMARY: (\d+) hazard", "sanitizer", "hazards", "hazards"),
    ):
        if found := re.search(pattern, log):
            yield one(subject, metric, found[1], unit)


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    "step": step_rows, "kernels": kernel_rows, "sampling": sampling_rows, "extract": extract_rows,
    "safety": safety_rows, "memory": memory_rows, "junit": junit_rows, "lines": line_rows, "run": run_rows,
    "verdict": verdict_rows,
}  # fmt: skip
