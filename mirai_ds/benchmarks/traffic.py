"""What else of a training step is memory traffic: `python -m mirai_ds.benchmarks.traffic`.

Times RMSNorm, the rotary table, SwiGLU's product and the cross-entropy, forward and backward, at a model's sizes: as
the model runs them, through torch.compile, and with Liger-Kernel where that is installed; beside forward and backward
of the whole model at the same batch.  The numbers decide whether fusing them is worth a switch or a dependency.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mirai_ds.benchmarks import kernels as bench
from mirai_ds.benchmarks.harness import (
    add_device,
    append,
    command_line,
    facts,
    milliseconds,
    new_parser,
    only_table,
    queued_milliseconds,
    read,
    restart_as_training_runs,
)
from mirai_ds.config import ModelConfig
from mirai_ds.model import GPT, initialise, next_token_loss
from mirai_ds.model.gpt import RMSNorm
from mirai_ds.model.rope2d import apply_rope, rope_table
from mirai_ds.runtime import markdown

Loss = Callable[..., Tensor]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU as FeedForward computes it."""
    return F.silu(gate) * up


@dataclass
class Operation:
    """A function of differentiable inputs that one step uses `uses` times; `liger` is Liger-Kernel's, if it has one."""

    uses: int
    function: Loss
    inputs: list[Tensor]
    liger: Loss | None = None


def operations(model: ModelConfig, batch: int, dtype: torch.dtype, device: str) -> dict[str, Operation]:
    """Everything of the model that moves more than it computes, but the alignment loss."""
    slots, width, hidden = model.block_size, model.width, model.ffn_hidden
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype).requires_grad_()

    norm = RMSNorm(width, model.norm_eps).to(device, dtype)
    rope = rope_table(model.grid, width // model.heads).to(device)[:slots]
    tokens = torch.randint(0, model.vocab_size, (batch, slots), generator=generator, device=device)
    ops = {
        "rmsnorm": Operation(2 * model.depth + 1, norm, [random(batch, slots, width)]),
        "rotary": Operation(
            2 * model.depth, lambda x: apply_rope(x, rope), [random(batch, slots, model.heads, width // model.heads)]
        ),
        "swiglu": Operation(model.depth, swiglu, [random(batch, slots, hidden), random(batch, slots, hidden)]),
        "cross-entropy": Operation(
            1, lambda logits: next_token_loss(logits, tokens), [random(batch, slots, model.vocab_size)]
        ),
    }
    if device == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import functional

        ops["rmsnorm"].liger = lambda x: functional.liger_rms_norm(x, norm.weight, model.norm_eps, in_place=False)
        ops["swiglu"].liger = functional.liger_swiglu
        ops["cross-entropy"].liger = lambda x: functional.liger_cross_entropy(x.flatten(0, 1), tokens.flatten())
    return ops


def both_passes(function: Loss, inputs: Sequence[Tensor]) -> Callable[[], Any]:
    """Forward and backward with a gradient of the output that is there already."""
    out = function(*inputs)
    upstream = torch.ones_like(out)
    return lambda: torch.autograd.grad(function(*inputs), inputs, upstream)


def step_milliseconds(model: ModelConfig, batch: int, dtype: torch.dtype, device: str, runs: int = 3) -> float:
    """Milliseconds of the whole model's forward and backward pass, the best of a few."""
    gpt = GPT(model)
    initialise(gpt, 0)
    gpt = gpt.to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.vocab_size, (batch, model.block_size), generator=generator).to(device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    best = float("inf")
    for _ in range(runs + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        next_token_loss(gpt(tokens[:, :-1], labels).logits, tokens).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - began) * 1e3)
    return best


def measure(size: str, batch: int, dtype: str, device: str, rounds: int, command: str) -> list[bench.Row]:
    """Rows of all operations of one model, `ratio` being of eager's time; and of one step, against itself."""
    model = ModelConfig(size=f"GPT-{size}")
    about = facts(device, command)
    torch_dtype = bench.DTYPES[dtype]
    step = step_milliseconds(model, batch, torch_dtype, device)
    timed = [("step", "eager", step, 1.0, 1)]
    for name, op in operations(model, batch, torch_dtype, device).items():
        torch._dynamo.reset()
        runs = {"eager": both_passes(op.function, op.inputs)}
        runs["compiled"] = both_passes(torch.compile(op.function, dynamic=False), op.inputs)
        if op.liger is not None:
            runs["liger"] = both_passes(op.liger, op.inputs)
        times = queued_milliseconds(runs, rounds) if device == "cuda" else milliseconds(runs, rounds)
        timed += [(name, variant, ms, ms / times["eager"], op.uses) for variant, ms in times.items()]
    return [
        bench.Row(
            **about, op=op, size=size, method=f"{uses} a step", batch=batch, heads=model.heads, width=model.width,
            dtype=dtype, variant=variant, median_ms=round(ms, 4), ratio=round(ratio, 2), extra_mib=0.0,
            gradient_mib=0.0, gb_per_s=0.0,
        )
        for op, variant, ms, ratio, uses in timed
    ]  # fmt: skip


def table(rows: Sequence[dict[str, str]]) -> str:
    """Markdown: a line an operation, its share of the step and what compiling it would leave of the step."""
    header = "device | model, batch, dtype | operation | uses a step | eager ms | of the step | torch.compile | Liger"
    lines = []
    for step in (row for row in rows if row["op"] == "step"):
        same = [r for r in rows if all(r[k] == step[k] for k in ("device", "size", "batch", "dtype"))]
        for row in (r for r in same if r["method"].endswith(" a step") and r["op"] != "step"):
            if row["variant"] != "eager":
                continue
            uses = int(row["method"].split()[0])
            share = uses * float(row["median_ms"]) / float(step["median_ms"])
            ratios = {r["variant"]: f"{float(r['ratio']):.2f}x" for r in same if r["op"] == row["op"]}
            lines.append(
                f"{row['device']}, torch {row['torch']}, {row['date']} | GPT-{row['size']}, {row['batch']}, "
                f"{row['dtype']} | {row['op']} | {uses} | {float(row['median_ms']):.3g} | {share:.1%} | "
                f"{ratios['compiled']} | {ratios.get('liger', '-')}"
            )
    return markdown.table(header, lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, add rows to the results file, print the table."""
    parser = new_parser("traffic", __doc__)
    add_device(parser)
    parser.add_argument("--size", choices=bench.WIDTHS, default="B")
    parser.add_argument("--dtypes", nargs="+", choices=bench.DTYPES, default=list(bench.DTYPES))
    parser.add_argument("--batch", type=int, help="default: 4 on the CPU, 32 on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    given = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(given)
    if only_table(args, table, bench.COLUMNS):
        return 0
    command = command_line("python -m mirai_ds.benchmarks.traffic", given, [args.out])
    batch = args.batch or (4 if args.device == "cpu" else 32)
    for dtype in args.dtypes:
        rows = measure(args.size, batch, dtype, args.device, args.rounds, command)
        append(args.out, bench.COLUMNS, [asdict(row) for row in rows], bench.KEY)
    print(table(read(args.out)))
    return 0


if __name__ == "__main__":
    restart_as_training_runs("mirai_ds.benchmarks.traffic")
    sys.exit(main())
