"""What it costs to survive: `python -m mirai_ds.benchmarks.safety [--ranks 2] [--set ...]`.

  step      guarded steps (watchdog beats, agreement of the ranks, refusal of losses that are not finite, a look at the
            stop file) against the same steps without; blocks of both take turns in one run, what counts is the ratio
  save      how long training stands still for a checkpoint: written at once, and in the background
  digests   sha256 of a checkpoint when it is written and verified, of the time that writing takes
It starts its own ranks; under torchrun or srun it is one of them.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mirai_ds.benchmarks.harness import append, command_line, facts, new_parser, only_table
from mirai_ds.runtime import markdown
from mirai_ds.runtime.distributed import World, leave_process_group, read_world

MODULE = "mirai_ds.benchmarks.safety"
FIELDS = ("date", "device", "python", "torch", "cuda", "command", "ranks", "model", "what", "variant", "value", "unit",
          "ratio")  # fmt: skip
Row = dict[str, str]


def bare_steps(session: Any, count: int) -> None:
    """Takes steps as a loop without guards does."""
    from mirai_ds.train import step as module

    guarded = module.propagate_nonfinite_loss
    module.propagate_nonfinite_loss = lambda loss: loss
    try:
        for _ in range(count):
            module.train_step(session, session.step)
            session.count_step()
    finally:
        module.propagate_nonfinite_loss = guarded


def guarded_steps(session: Any, count: int) -> None:
    """Takes steps with what `run_loop` does around them; the last one is looked at."""
    from mirai_ds.runtime.control import Facts
    from mirai_ds.train.nonfinite import confirm_step
    from mirai_ds.train.step import train_step

    for _ in range(count):
        session.beat(f"step {session.step + 1}")
        session.control.post(Facts(session.stop.poll(), session.checkpoints.saver.written, session.run_lock.lost))
        record = train_step(session, session.step)
        session.count_step()
        session.control.arrived()
    confirm_step(session, record)


def seconds(run: Callable[[], None], session: Any) -> float:
    """Seconds that `run` takes on this rank when all ranks start together."""
    session.control.barrier()
    began = time.perf_counter()
    run()
    if session.device.type == "cuda":
        import torch

        torch.cuda.synchronize(session.device)
    return time.perf_counter() - began


def step_times(session: Any, rounds: int, block: int) -> dict[str, float]:
    """Median seconds a step of both variants, and the median over rounds of their ratio; who goes first alternates."""
    variants = {"guarded": guarded_steps, "bare": bare_steps}
    turns: dict[str, list[float]] = {name: [] for name in variants}
    guarded_steps(session, 3)
    for number in range(rounds):
        for name in sorted(variants, reverse=bool(number % 2)):
            turns[name].append(seconds(lambda name=name: variants[name](session, block), session) / block)  # type: ignore[misc]
    ratios = [guarded / bare for guarded, bare in zip(turns["guarded"], turns["bare"], strict=True)]
    return {"ratio": statistics.median(ratios), **{name: statistics.median(times) for name, times in turns.items()}}


def part_times(session: Any, repeat: int = 200) -> dict[str, float]:
    """Seconds of each part of a guarded step by itself; in a step the agreement is waited for only if the step is
    faster."""
    import torch

    from mirai_ds.runtime.control import Facts
    from mirai_ds.train.step import propagate_nonfinite_loss

    loss = torch.ones((), device=session.device, requires_grad=True)

    def agree() -> None:
        session.control.post(Facts())
        session.control.arrived()

    def look() -> None:
        session.beat("bench")
        session.stop.poll()

    def each(run: Callable[[], Any]) -> float:
        def often() -> None:
            for _ in range(repeat):
                run()

        run()
        return seconds(often, session) / repeat

    refusal = each(lambda: propagate_nonfinite_loss(loss * 2).backward()) - each(lambda: (loss * 2).backward())
    return {"agreement of the ranks": each(agree), "refusal of a loss": refusal, "beat and look": each(look)}


def save_times(session: Any, rounds: int) -> dict[str, float]:
    """Median seconds that training stands still, for a save at once and one in the background; `written`: until the
    background one was safe, training on meanwhile."""
    spent: dict[str, list[float]] = {"at once": [], "in the background": [], "written": []}
    for _ in range(rounds):
        for name, background in (("at once", False), ("in the background", True)):
            session.checkpoints.saver.config.background = background
            guarded_steps(session, 1)
            began = session.checkpoints.saver.stall_seconds
            session.control.barrier()
            session.save_checkpoint()
            while session.checkpoints.saver.in_flight >= 0:
                guarded_steps(session, 1)
                session.checkpoints.saver.poll(session.control.facts.written)
            spent[name].append(session.checkpoints.saver.stall_seconds - began)
            if background:
                spent["written"].append(session.checkpoints.saver.write_seconds)
    return {name: statistics.median(times) for name, times in spent.items()}


def digest_times(session: Any) -> dict[str, float]:
    """Seconds to write this rank's part, to hash it, to verify the whole checkpoint; and its bytes."""
    from mirai_ds.checkpoint import store
    from mirai_ds.checkpoint.format import rank_file, write_snapshot
    from mirai_ds.runtime.disk import digest_of_file, sync

    folder = store.folder_of(session.run, store.list_steps(session.run)[-1])
    path = rank_file(folder.with_name("bench"), session.world.rank)
    path.parent.mkdir(exist_ok=True)

    def write() -> None:
        write_snapshot(path, session.checkpoints.take())
        sync(path)

    def hash_it() -> None:
        digest_of_file(path)

    def verify_it() -> None:
        store.verify(folder)

    written = statistics.median(seconds(write, session) for _ in range(3))
    hashed = statistics.median(seconds(hash_it, session) for _ in range(3))
    verified = statistics.median(seconds(verify_it, session) for _ in range(3))
    return {"write": written, "digest": hashed, "verify": verified, "bytes": float(path.stat().st_size)}


def rows_of(session: Any, rounds: int, block: int, about: Row) -> list[Row]:
    """Measures everything and returns the rows; collective."""
    steps = step_times(session, rounds, block)
    parts = part_times(session)
    saves = save_times(session, max(3, min(8, rounds // 4)))
    digests = digest_times(session)
    step = steps["bare"]
    mib = digests["bytes"] / 2**20

    def row(what: str, variant: str, value: float, unit: str, ratio: float | None) -> Row:
        return {**about, "what": what, "variant": variant, "value": f"{value:.4g}", "unit": unit,
                "ratio": "" if ratio is None else f"{ratio:.3f}"}  # fmt: skip

    return [
        row("step", "guarded", steps["guarded"] * 1e3, "ms", steps["ratio"]),
        row("step", "bare", step * 1e3, "ms", 1.0),
        *[row("part of a guarded step", name, value * 1e3, "ms", value / step) for name, value in parts.items()],
        row("stall of a save, in steps", "at once", saves["at once"] * 1e3, "ms", saves["at once"] / step),
        row("stall of a save, in steps", "in the background", saves["in the background"] * 1e3, "ms",
            saves["in the background"] / step),
        row("background save until safe, in steps", "in the background", saves["written"] * 1e3, "ms",
            saves["written"] / step),
        row(f"writing {mib:.0f} MiB a rank", "copy, write, flush", digests["write"] * 1e3, "ms", 1.0),
        row(f"writing {mib:.0f} MiB a rank", "digest of it", digests["digest"] * 1e3, "ms",
            digests["digest"] / digests["write"]),
        row(f"writing {mib:.0f} MiB a rank", "verify the whole checkpoint", digests["verify"] * 1e3, "ms",
            digests["verify"] / digests["write"]),
    ]  # fmt: skip


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    cells = "{device} | {ranks}, {model} | {what} | {variant} | {value} {unit} | {ratio}"
    header = "device | ranks, model | what | variant | time | ratio"
    return markdown.table(header, map(cells.format_map, rows), "llllrr")


def measure(world: World, overrides: list[str], run: Path, rounds: int, block: int, command: str) -> list[Row]:
    """Builds one rank's session in `run` and measures; the main rank returns the rows."""
    from mirai_ds.config import load
    from mirai_ds.engine.start import start_process_group
    from mirai_ds.runtime.distributed import local_device
    from mirai_ds.runtime.signals import STOP_FILE, StopRequests
    from mirai_ds.runtime.watchdog import Watchdog
    from mirai_ds.train.build import build_session
    from mirai_ds.train.run_folder import RunFolder

    config = load("digits-mirai-e", ["eval.classifier.enabled=false", "foresight.warmup_epochs=0", *overrides])
    device = local_device(world)
    start_process_group(world, 5)
    folder = RunFolder.open(config, run, world, resume=None, fresh=False)
    folder.accept(config, {})
    run_lock, stop = folder.lock, StopRequests()
    stop.watch_file(run / STOP_FILE)
    session = build_session(config, run, world, device, run_lock, stop)
    watchdog = Watchdog(600, run / "hang", world.rank, world.size, lambda text: None)
    session.beat = watchdog.beat
    if session.is_main:
        run_lock.watch()
    millions = sum(p.numel() for p in session.engine.ds.module.parameters()) / 1e6
    about = {**facts(device.type, command), "ranks": str(world.size), "model": f"{millions:.1f} M"}
    rows = rows_of(session, rounds, block, about)
    watchdog.close()
    run_lock.release("finished")
    session.control.barrier()
    return rows if session.is_main else []


def main(argv: list[str] | None = None) -> int:
    """Measure, print, append to the results."""
    argv = sys.argv[1:] if argv is None else argv
    parser = new_parser("safety", __doc__)
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--block", type=int, default=1, help="steps in a turn")
    parser.add_argument("--run-dir", type=Path)
    args = parser.parse_args(argv)
    if only_table(args, table, FIELDS):
        return 0
    world = read_world()
    if world is None:
        from mirai_ds.runtime.launch import launch, visible_gpus

        with tempfile.TemporaryDirectory() as folder:
            return launch(
                MODULE, [*argv, "--run-dir", f"{folder}/run"], args.ranks or min(2, visible_gpus() or 2), visible_gpus()
            )
    command = command_line(f"python -m {MODULE}", argv, [args.out, args.run_dir])
    rows = measure(world, args.overrides, args.run_dir, args.rounds, args.block, command)
    if rows:
        print(table(rows), flush=True)
        append(args.out, FIELDS, rows)
    leave_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
