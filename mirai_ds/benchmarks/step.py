"""How fast a training step is: `mirai-ds bench step`.

Compared are the trainer as configured (`mirai_ds`) and the plain baseline (`benchmarks/plain.py`: DDP, separate copies
for the average and the teacher, an fp32 teacher; eager, and on a GPU compiled too), in these comparisons:

  plain      mirai_ds against the baseline, same method, batch and precision; of Mirai-E also with the baseline's fp32
             teacher, which runs in the step's precision otherwise
  overhead   mirai_ds with alignment against mirai_ds without
  ranks      mirai_ds on ZeRO-2 against the baseline's DDP, two ranks (on a CPU), no alignment
  switches   mirai_ds with one thing changed at a time: compiled or not, chunked loss or not, recompute policies, stages

The two sides of a comparison are processes that take turns step by step; what counts is the median of the ratios of
neighbouring steps.  Then each tells where its time goes (`parts`, with waits in between: a little slower) and its peak
memory within a step, states included: on a GPU the caching allocator's, on a CPU what malloc has handed out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mirai_ds.benchmarks.arms import BenchArm, Workers
from mirai_ds.benchmarks.harness import append, command_line, facts, new_parser, only_table
from mirai_ds.runtime import markdown
from mirai_ds.runtime.launch import CPU_MEMORY, GPU_MEMORY, visible_gpus

FIELDS = ("date", "device", "python", "torch", "deepspeed", "command", "comparison", "model", "method", "precision",
          "batch", "ranks", "threads", "variant", "rounds", "median_s", "times_as_fast", "memory_gb",
          "memory_ratio", "states_gb", "resident_gb", "mfu", "last_loss", "parts")  # fmt: skip
METHODS = {"none": "llamagen-{}", "E": "mirai-e-{}", "I": "mirai-i-{}"}
COMPARISONS = ("plain", "overhead", "ranks", "switches")
WARM_UP = 5  # steps: compilation, AdamW's moments, the allocator, the capture
SWITCHES: dict[str, list[str]] = {
    "not captured": ["train.cuda_graph=off"],
    "not compiled": ["train.compile=none"],
    "all logits at once": ["train.cross_entropy=whole"],
    "recompute mlp": ["train.recompute.policy=mlp"],
    "recompute budget 0.5": ["train.recompute.policy=budget", "train.recompute.budget=0.5"],
    "recompute full": ["train.recompute.policy=full"],
    "ZeRO-2": ["deepspeed=zero2"],
    "bf16": ["train.precision=bf16", "deepspeed=zero1"],
}
Row = dict[str, str]


def overrides(args: argparse.Namespace, ranks: int) -> list[str]:
    """Overrides that all arms of a call share."""
    return [
        "foresight.warmup_epochs=0", f"train.global_batch_size={args.batch * ranks}", "train.grad_accum_steps=1",
        f"train.precision={args.precision}", *args.overrides,
    ]  # fmt: skip


def arm(
    args: argparse.Namespace, name: str, method: str, more: list[str], plain: bool = False, ranks: int = 1
) -> BenchArm:
    """An arm of this call's size, batch and precision."""
    recipe = METHODS[method].format(args.size.removeprefix("GPT-").lower())
    given = [o for o in overrides(args, ranks) if method != "none" or not o.startswith("foresight.")]
    threads = max(1, args.threads // ranks)
    memory = GPU_MEMORY if args.gpus else CPU_MEMORY
    return BenchArm(name, recipe, [*given, *more], plain, {} if plain else memory, ranks, threads, args.gpus)


def fastest(args: argparse.Namespace) -> list[str]:
    """The trainer as it is recommended for one device."""
    return ["train.compile=blocks", f"deepspeed={'zero1' if args.precision == 'bf16' else 'zero0'}"]


def comparisons(args: argparse.Namespace) -> Iterator[tuple[str, str, list[BenchArm]]]:
    """(comparison, method, arms); the first arm is what the others are compared with."""
    best = fastest(args)
    if "plain" in args.what:
        for method in args.methods:
            plain = arm(args, "plain", method, [], plain=True)
            sides = [plain, arm(args, "mirai_ds", method, best)]
            if method == "E" and args.precision != "fp32":  # like with like: the baseline's teacher is in fp32
                sides.append(arm(args, "mirai_ds, fp32 teacher", "E", [*best, "foresight.teacher_dtype=fp32"]))
            if args.gpus:  # as the authors' scripts do; on a CPU it gains nothing
                sides.insert(1, replace(plain, name="plain, compiled", settings={"compiled": True}))
            yield "plain", method, sides
    if "overhead" in args.what:
        for method in [m for m in args.methods if m != "none"]:
            yield "overhead", method, [arm(args, "none", "none", best), arm(args, method, method, best)]
    if "ranks" in args.what and not args.gpus:
        two = ["deepspeed=zero2", "train.compile=none"]
        yield "ranks", "none", [
            arm(args, "DDP", "none", [], plain=True, ranks=2), arm(args, "ZeRO-2", "none", two, ranks=2),
            arm(args, "ZeRO-2, compiled", "none", [*two, "train.compile=blocks"], ranks=2),
        ]  # fmt: skip
    if "switches" in args.what:
        for name, change in SWITCHES.items():
            if args.switches and name not in args.switches:
                continue
            yield "switches", "E", [arm(args, "mirai_ds", "E", best), arm(args, name, "E", [*best, *change])]


def take_turns(arms: list[BenchArm], rounds: int) -> list[dict[str, Any]]:
    """Seconds, losses and parts of each arm; who goes first alternates."""
    workers = [Workers(a) for a in arms]
    try:
        for worker in workers:
            for _ in range(WARM_UP):
                worker.ask("step")
        measured: list[dict[str, Any]] = [{"seconds": [], "loss": 0.0} for _ in arms]
        for number in range(rounds):
            for i in sorted(range(len(arms)), reverse=bool(number % 2)):
                answers = workers[i].ask("step")
                measured[i]["seconds"].append(max(a["seconds"] for a in answers))
                measured[i]["loss"] = statistics.mean(a["loss"] for a in answers)
        for i, worker in enumerate(workers):
            measured[i]["parts"] = worker.ask("parts")[0]["parts"]
            answers = worker.ask("memory")
            measured[i]["memory"] = {name: max(a[name] for a in answers) for name in answers[0]}
    finally:
        for worker in workers:
            worker.close()
    return measured


def measure(args: argparse.Namespace, command: str) -> Iterator[list[Row]]:
    """Yields the rows of one comparison after the other."""
    about = {**where(args), "command": command, "model": args.size, "batch": str(args.batch)}
    for comparison, method, arms in comparisons(args):
        times = take_turns(arms, args.rounds)
        rows = []
        for a, measured in zip(arms, times, strict=True):
            held = measured["memory"]
            ratios = [first / own for first, own in zip(times[0]["seconds"], measured["seconds"], strict=True)]
            median = statistics.median(measured["seconds"])
            precision = next(o for o in reversed(a.overrides) if o.startswith("train.precision=")).partition("=")[2]
            rows.append(about | {
                "comparison": comparison, "method": method, "precision": precision, "ranks": str(a.ranks),
                "threads": str(a.threads), "variant": a.name, "rounds": str(args.rounds), "median_s": f"{median:.4g}",
                "times_as_fast": f"{statistics.median(ratios):.3f}",
                "memory_gb": f"{held['peak'] / 1e9:.2f}",
                "memory_ratio": f"{held['peak'] / times[0]['memory']['peak']:.3f}",
                "states_gb": f"{held['resting'] / 1e9:.2f}",
                "resident_gb": "" if args.gpus else f"{held['resident'] / 1e9:.2f}",
                "mfu": utilisation(a, args, median) if args.gpus else "", "last_loss": f"{measured['loss']:.5f}",
                "parts": json.dumps({n: round(s, 4) for n, s in sorted(measured["parts"].items())}),
            })  # fmt: skip
        yield rows


def where(args: argparse.Namespace) -> Row:
    """The columns that name the device and the versions."""
    from mirai_ds.runtime.environment import package_versions

    about = facts("cuda" if args.gpus else "cpu", "")
    device = about["device"] if args.gpus else about["device"].partition(",")[0]
    return {"date": time.strftime("%Y-%m-%d"), "device": device, "python": about["python"], "torch": about["torch"],
            "deepspeed": package_versions()["deepspeed"]}  # fmt: skip


def utilisation(a: BenchArm, args: argparse.Namespace, seconds: float) -> str:
    """Model FLOPs (attention included, recomputation not) a second over the device's dense bf16 peak; empty where that
    is not known."""
    from mirai_ds.config import load
    from mirai_ds.planning.devices import DEVICES
    from mirai_ds.planning.flops import training_flops

    name = where(args)["device"].lower().replace(" ", "")
    peak = next((d.bf16 for d in DEVICES.values() if d.name.partition("-")[0] in name), 0.0)
    if not peak:
        return ""
    config = load(a.recipe, a.overrides)
    width = 1024 if config.foresight.teacher == "encoder" and config.model.size != "GPT-B" else 768
    feature_dim = config.model.width if config.foresight.teacher != "encoder" else width
    flops = training_flops(config.model, config.foresight, feature_dim, config.foresight.active)
    return f"{args.batch * flops / seconds / peak:.3f}"


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    header = "device | comparison | model, method, batch, ranks | variant, precision | s a step | times as fast"
    cells = (
        "{device}, torch {torch}, {date} | {comparison} | {model}, {method}, {batch}, {ranks} | {variant}, {precision} "
        "| {median_s} | {times_as_fast} | {memory_gb} | {memory_ratio} | {mfu}"
    )
    return markdown.table(f"{header} | peak GB | of the first's | MFU", map(cells.format_map, rows), "llllrrrrr")


def parts_table(rows: list[Row]) -> str:
    """Markdown: where the time of each variant goes, in percent of its step."""
    measured = [(r, json.loads(r["parts"])) for r in rows]
    names = sorted(
        {name for _, parts in measured for name in parts}, key=lambda n: (-max(p.get(n, 0) for _, p in measured), n)
    )
    lines = []
    for r, parts in measured:
        shares = (f"{100 * parts.get(name, 0) / sum(parts.values()):.1f}" for name in names)
        lines.append(" | ".join([f"{r['variant']}, {r['method']}", *shares]))
    return markdown.table(" | ".join(["variant", *names]), lines, "l" + "r" * len(names))


def arguments(argv: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    import os

    parser = new_parser("step", __doc__)
    parser.add_argument("what", nargs="*", help=f"of {', '.join(COMPARISONS)}; default the first three")
    parser.add_argument("--size", default="GPT-B", choices=("GPT-B", "GPT-L", "GPT-XL"))
    parser.add_argument("--methods", default="none,E", help="comma-separated: none, E, I")
    parser.add_argument("--batch", type=int, help="sequences a rank; default 32 on a GPU, 4 on a CPU")
    parser.add_argument("--precision", default="bf16-autocast", choices=("fp32", "bf16-autocast", "bf16"))
    parser.add_argument("--rounds", type=int, help="turns; default 20 on a GPU, 5 on a CPU")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of a CPU, for all ranks")
    parser.add_argument("--switches", type=lambda text: text.split(","), help="some of them, by name")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--json", action="store_true", help="print rows as lines of JSON, not as a table")
    args = parser.parse_args(argv)
    args.gpus = min(1, visible_gpus())
    args.what = args.what or list(COMPARISONS[:3])
    args.methods = args.methods.split(",")
    for name, given, known in (("what", args.what, COMPARISONS), ("--methods", args.methods, METHODS)):
        if wrong := [g for g in given if g not in known]:
            parser.error(f"{name}: {wrong[0]!r} is none of {', '.join(known)}")
    args.batch = args.batch or (32 if args.gpus else 4)
    args.rounds = args.rounds or (20 if args.gpus else 5)
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, print, append to the results."""
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    if only_table(args, lambda rows: f"{table(rows)}\n\n{parts_table(rows)}", FIELDS):
        return 0
    for rows in measure(args, command_line("mirai-ds bench step", argv, [args.out])):
        print("\n".join(map(json.dumps, rows)) if args.json else f"{table(rows)}\n\n{parts_table(rows)}\n", flush=True)
        append(args.out, FIELDS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
