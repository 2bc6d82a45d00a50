"""Time and memory of the alignment loss, forward and backward: `python -m mirai_ds.benchmarks.kernels`.

Variants take turns, so that a slow moment of the machine meets all of them, and are compared as ratios of medians in
one run, with the memory settings of training.  `eager` is the reference; `compiled` is torch.compile of the same sums
written for it (the mask on the cosines, where the reference has it on the states too, for slots that are not finite,
and checks its arguments); `copy` moves the fewest bytes the task allows: `projected` and the target read once, the
gradient written once.
Rows go to a CSV file with device, date, versions and command; `--table` prints the table of docs/kernels.md from them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mirai_ds.benchmarks.harness import (
    add_device,
    append,
    command_line,
    facts,
    milliseconds,
    new_parser,
    only_table,
    peak_extra_bytes,
    queued_milliseconds,
    restart_as_training_runs,
)
from mirai_ds.kernels.foresight_cosine import foresight_cosine, reference
from mirai_ds.runtime import markdown

WIDTHS = {"B": 768, "L": 1024, "XL": 1280}
METHODS = {"E": 3, "I": 1}  # heads
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GRID = 16
KEY = ("device", "op", "size", "method", "batch", "dtype", "variant")  # a later row of the same takes its place


@dataclass(frozen=True)
class Row:
    """One variant of one task on one device."""

    date: str
    device: str
    python: str
    torch: str
    cuda: str
    command: str
    op: str
    size: str
    method: str
    batch: int
    heads: int
    width: int
    dtype: str
    variant: str
    median_ms: float
    ratio: float  # of its time to the first variant's, in the same run
    extra_mib: float  # peak memory beyond the inputs
    gradient_mib: float
    gb_per_s: float  # of the fewest bytes


COLUMNS = [field.name for field in fields(Row)]


@dataclass
class KernelTask:
    """Inputs as training has them: a 16x16 grid, official offsets, wrapped borders."""

    projected: list[Tensor]
    target: Tensor
    index: Tensor
    weights: Tensor
    counts: Tensor

    @property
    def fewest_bytes(self) -> int:
        """The bytes of reading `projected` and the target once and writing the gradient."""
        states = sum(p.numel() * p.element_size() for p in self.projected)
        return 2 * states + self.target.numel() * self.target.element_size()

    @property
    def constants(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The operation's arguments after `projected`."""
        return self.target, self.index, self.weights, self.counts


def task(heads: int, width: int, batch: int, dtype: torch.dtype, device: str) -> KernelTask:
    """Random features; head k looks 0, 1 or 16 cells ahead and has no target beyond the last cell."""
    cells = GRID * GRID
    shifts = torch.tensor([0, 1, GRID][:heads])
    index = torch.arange(cells)[:, None] + shifts
    index = torch.where(index < cells, index, -1).int().to(device)
    generator = torch.Generator(device).manual_seed(0)
    make = lambda: torch.randn(batch, cells, width, generator=generator, device=device).to(dtype)  # noqa: E731
    counts = (index >= 0).sum(0).float()
    return KernelTask(
        [make().requires_grad_() for _ in range(heads)], make(), index, torch.full_like(counts, 2.0), counts
    )


def masked(projected: list[Tensor], target: Tensor, index: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """The reference's loss in operations that torch.compile fuses well."""
    normed = F.normalize(target.float(), dim=-1)
    total = weights.new_zeros(())
    for k, states in enumerate(projected):
        rows = index[:, k].long()
        cosine = (F.normalize(states.float(), dim=-1) * normed[:, rows.clamp(min=0)]).sum(-1)
        kept = torch.where(rows >= 0, cosine, 0.0).sum()
        total = total - weights[k] * kept / (counts[k] * states.shape[0])
    return total


def variants(t: KernelTask) -> dict[str, Callable[[], Any]]:
    """Maps names to a forward and backward pass each; `copy` only moves the bytes."""
    compiled = torch.compile(masked, dynamic=False)
    half = torch.empty(t.fewest_bytes // 8, dtype=torch.float32, device=t.target.device)
    to = torch.empty_like(half)

    def both(loss_of: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss_of(), t.projected)

    return {
        "fused": both(lambda: foresight_cosine(t.projected, *t.constants, kernel=t.target.device.type)[0]),
        "eager": both(lambda: reference.foresight_cosine(t.projected, *t.constants)[0]),
        "compiled": both(lambda: compiled(t.projected, *t.constants)),
        "copy": lambda: to.copy_(half),
    }


def measure(size: str, method: str, dtype: str, batch: int, device: str, rounds: int, command: str) -> list[Row]:
    """Measures all variants of one task."""
    torch._dynamo.reset()
    heads, width = METHODS[method], WIDTHS[size]
    t = task(heads, width, batch, DTYPES[dtype], device)
    runs = variants(t)
    times = queued_milliseconds(runs, rounds) if device == "cuda" else milliseconds(runs, rounds)
    gradient = sum(p.numel() * p.element_size() for p in t.projected)
    rows = []
    for name, run in runs.items():
        extra = 0 if name == "copy" else peak_extra_bytes(run, device)
        rows.append(
            Row(
                **facts(device, command),
                op="foresight_cosine",
                size=size,
                method=method,
                batch=batch,
                heads=heads,
                width=width,
                dtype=dtype,
                variant=name,
                median_ms=round(times[name], 4),
                ratio=round(times[name] / times["fused"], 2),
                extra_mib=round(extra / 2**20, 2),
                gradient_mib=round(gradient / 2**20, 2),
                gb_per_s=round(t.fewest_bytes / times[name] / 1e6, 1),
            )
        )
    return rows


def table(rows: list[dict[str, str]]) -> str:
    """A Markdown table with one line per task."""
    tasks: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        if row["op"] != "foresight_cosine":
            continue
        key = tuple(row[k] for k in ("device", "size", "method", "dtype", "batch", "date", "torch"))
        tasks.setdefault(key, {})[row["variant"]] = row
    header = "device | model, method, batch | dtype | fused, ms | eager | torch.compile | copy of the fewest bytes"
    lines = []
    for (device, size, method, dtype, batch, date, version), variants in tasks.items():
        fused = variants["fused"]
        eager, compiled, copy = (float(variants[name]["ratio"]) for name in ("eager", "compiled", "copy"))
        extra = float(fused["extra_mib"]) / float(fused["gradient_mib"])
        lines.append(
            f"{device}, torch {version}, {date} | GPT-{size}, Mirai-{method}, {batch} | {dtype} | "
            f"{float(fused['median_ms']):.3g} | {eager:.1f}x | {compiled:.1f}x | {copy:.2f}x | {extra:.2f}"
        )
    return markdown.table(f"{header} | extra memory / gradient", lines)


def main(argv: list[str] | None = None) -> int:
    """Measure and write rows, or print the table of rows that are there."""
    parser = new_parser("kernels", __doc__)
    add_device(parser)
    parser.add_argument("--sizes", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    given = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(given)
    if only_table(args, table, COLUMNS):
        return 0
    command = command_line("python -m mirai_ds.benchmarks.kernels", given, [args.out])
    for size in args.sizes:
        for method in args.methods:
            for dtype in args.dtypes:
                rows = measure(size, method, dtype, args.batch, args.device, args.rounds, command)
                append(args.out, COLUMNS, [asdict(row) for row in rows], KEY)
                print(table([{k: str(v) for k, v in asdict(r).items()} for r in rows]).splitlines()[-1], flush=True)
    return 0


if __name__ == "__main__":
    restart_as_training_runs("mirai_ds.benchmarks.kernels")
    sys.exit(main())
