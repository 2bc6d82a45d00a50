"""Real ranks of a real run, forked from a warm process (`tests/warm.py`): a start costs one second, not fifteen.

No launcher is between them: whoever survives a killed peer has to notice by itself.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.warm import warm_context

SETTINGS = [
    "model.dim=32", "model.n_layer=3", "model.n_head=2", "train.epochs=3", "train.max_steps=24",
    "train.global_batch_size=32", "foresight.warmup_epochs=0.18", "foresight.projector_dim=32",
    "foresight.kernel=reference", "logging.every_steps=1", "logging.progress=false", "checkpoint.every_steps=4",
    "checkpoint.keep_last=3", "eval.loss.every_steps=8", "eval.loss.max_samples=32",
    "sampling.per_class=1", "sampling.classes=4",
    "sampling.every_steps=12", "eval.classifier.enabled=false", "optimizer.warmup_steps=5", "ema.decay=0.9",
    "model.token_dropout=0.05", "model.resid_dropout=0.1", "model.ffn_dropout=0.1", "optimizer.lr=2e-3",
]  # fmt: skip


@dataclass(frozen=True)
class Kill:
    """SIGKILL to `rank`: `delay` seconds after it enters a phase that starts with `phase` for the `occurrence`-th time,
    or (`event`) at that file-system event below the run's folder."""

    rank: int
    phase: str = ""
    occurrence: int = 1
    delay: float = 0.0
    event: int = 0


@dataclass
class Ended:
    """How the ranks of a start ended."""

    codes: list[int | None]
    out: str
    outcome: str


def around_steps(wrap: Callable[[Callable[[Any, int], Any], Any, int], Any]) -> None:
    """In a rank: `wrap(step, session, number)` instead of each `step(session, number)`, examined ones among them."""
    from mirai_ds.train import loop
    from mirai_ds.train import nonfinite as guarded

    inner = loop.train_step

    def stepped(session: Any, number: int, plainly: bool = False) -> Any:
        return wrap(inner, session, number)

    loop.train_step = guarded.train_step = stepped


def run_ranks(
    run: Path,
    *extra: str,
    world: int = 2,
    settings: list[str] | None = None,
    recipe: str = "digits-mirai-e",
    kill: Kill | None = None,
    prepare: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
    during: Callable[[list[Any]], None] | None = None,
    env: dict[str, str] | None = None,
    timeout: float = 120,
) -> Ended:
    """One start: train `recipe` into `run`.  prepare(*arguments) runs in every rank first (to break something); during
    gets the processes once they run.  Fails when a rank is still there after `timeout` seconds."""
    processes, logs = start_ranks(run, *extra, world=world, settings=settings, recipe=recipe, kill=kill,
                                  prepare=prepare, arguments=arguments, env=env)  # fmt: skip
    if during is not None:
        during(processes)
    return wait_for(run, processes, logs, timeout)


def start_ranks(
    run: Path, *extra: str, world: int = 2, settings: list[str] | None = None, recipe: str = "digits-mirai-e",
    kill: Kill | None = None, prepare: Callable[..., None] | None = None, arguments: tuple[Any, ...] = (),
    env: dict[str, str] | None = None,
) -> tuple[list[Any], list[Path]]:  # fmt: skip
    """Fork the ranks; their output goes to files beside the run."""
    context = warm_context()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    chosen = [part for o in (SETTINGS + (settings or [])) for part in ("--set", o)]
    argv = [recipe, *chosen, "--run-dir", str(run), *extra]
    processes, logs = [], []
    outcome = run.with_name(f"{run.name}.outcome")  # as a job's own: a start that is refused writes nowhere else
    outcome.unlink(missing_ok=True)
    for rank in range(world):
        log = run.with_name(f"{run.name}.rank{rank}.log")
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        names = (
            {k: str(v) for k, v in place.items()}
            | {"MASTER_ADDR": "127.0.0.1", "MIRAI_DS_OUTCOME": str(outcome)}
            | (env or {})
        )
        mine = kill if kill is not None and kill.rank == rank else None
        process = context.Process(target=_rank, args=(argv, names, str(log), str(run), mine, prepare, arguments))
        process.start()
        processes.append(process)
        logs.append(log)
    return processes, logs


def wait_for(run: Path, processes: list[Any], logs: list[Path], timeout: float = 120) -> Ended:
    """Wait for all ranks."""
    until = time.monotonic() + timeout
    for process in processes:
        process.join(timeout=max(0.1, until - time.monotonic()))
    left = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    out = "".join(log.read_text(errors="replace") for log in logs if log.exists())
    assert not left, f"ranks {left} did not end within {timeout} s\n{out[-4000:]}"
    said = next((path for path in (run.with_name(f"{run.name}.outcome"), run / "outcome") if path.exists()), None)
    return Ended([p.exitcode for p in processes], out, said.read_text() if said else "")


def _rank(
    argv: list[str], names: dict[str, str], log: str, run: str, kill: Kill | None, prepare: Any, extra: Any
) -> None:
    handle = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(names, DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    import torch

    torch.set_num_threads(1)
    if kill is not None:
        _arm(kill, run)
    if prepare is not None:
        prepare(*extra)
    from mirai_ds.train.__main__ import main

    main(argv)


def _arm(kill: Kill, run: str) -> None:
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    if kill.event:
        seen = [0]

        def watch(event: str, arguments: Any) -> None:
            if event in WATCHED and any(isinstance(a, str) and a.startswith(run) for a in arguments[:2]):
                seen[0] += 1
                if seen[0] == kill.event:
                    die()

        sys.addaudithook(watch)
        return
    from mirai_ds.runtime.watchdog import Watchdog

    inner, count = Watchdog.beat, [0]

    def beat(self: Watchdog, phase: str) -> None:
        inner(self, phase)
        if phase.startswith(kill.phase):
            count[0] += 1
            if count[0] == kill.occurrence:
                threading.Timer(kill.delay, die).start()

    Watchdog.beat = beat  # type: ignore[method-assign]


WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir"}


def curve(run: Path) -> list[dict[str, Any]]:
    """What a resume must repeat to the last digit: every record without clocks and memory."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    timed = ("speed/", "memory/")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(timed)} for line in lines]


def pictures(run: Path) -> dict[str, bytes]:
    """Samples, as bytes of their files."""
    return {p.name: p.read_bytes() for p in sorted((run / "samples").glob("*.png"))}


def tensors(run: Path, step: int) -> dict[str, bytes]:
    """Every file of a checkpoint that holds tensors."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


def random_kill(source: random.Random, world: int) -> Kill:
    """Somewhere in a run of SETTINGS: starting, warm-up, steps, saving, evaluating, drawing, the end."""
    phases = {"preflight": 1, "step ": 24, "saving": 6, "evaluating": 8, "sampling": 4, "the end": 4, "loading": 1}
    phase = source.choice([*phases, "step ", "saving", "step "])
    longest = {"step ": 0.05, "saving": 0.02, "preflight": 0.5}.get(phase, 0.05)
    occurrence = source.randint(1, phases[phase])
    return Kill(source.randrange(world), phase, occurrence, source.random() * longest)
