"""One variant of a training step as a process of its own, stepped by its parent.

Variants take turns step by step, so that a slow moment of the machine meets all of them; each is a process (one a
rank), because memory allocators, thread counts and DeepSpeed's state belong to processes.  The parent writes a command
a line, the worker answers with a line of JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mirai_ds.benchmarks.device_time import device_time

MODULE = "mirai_ds.benchmarks.arms"
MAX_STEPS = 200  # that there is data for


@dataclass
class BenchArm:
    """What to run: the plain baseline or the trainer, on a recipe with overrides, in an environment.  module: another
    program that answers the same commands, with `settings` of its own; the baseline's may say `compiled`."""

    name: str
    recipe: str
    overrides: list[str] = field(default_factory=list)
    plain: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    ranks: int = 1
    threads: int = 1
    gpus: int = 0
    module: str = MODULE
    settings: dict[str, Any] = field(default_factory=dict)


class Workers:
    """The processes of one arm."""

    def __init__(self, arm: BenchArm) -> None:
        from mirai_ds.runtime.launch import free_port

        self.arm, port = arm, free_port()
        self.processes = []
        for rank in range(arm.ranks):
            environment = {**os.environ, **arm.environment}
            environment.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(arm.ranks), LOCAL_WORLD_SIZE=str(arm.ranks),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS=str(arm.threads),
            )  # fmt: skip
            if not arm.gpus:
                environment["DS_ACCELERATOR"] = "cpu"
            job = json.dumps(vars(arm))
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", arm.module, job],
                    env=environment,
                    text=True,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            )

    def ask(self, command: str) -> list[dict[str, Any]]:
        """Send a command to all ranks; their answers.  Raises RuntimeError when one has ended."""
        for process in self.processes:
            assert process.stdin is not None
            if process.stdin.closed:
                raise RuntimeError(f"{self.arm.name}: its process has ended before")
            process.stdin.write(command + "\n")
            process.stdin.flush()
        return [self._answer(process) for process in self.processes]

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        self.close()
        raise RuntimeError(f"{self.arm.name}: a process ended with {process.wait()}; what it said is above")

    def close(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


# --- in the worker --------------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds in named parts, each without the parts inside it; the device is waited for at every border."""

    def __init__(self, device: Any) -> None:
        self.device, self.seconds, self._stack = device, {}, []  # type: ignore[var-annotated]
        self._since = 0.0

    def _pass(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._stack:
            name = self._stack[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the time spent inside the context for the part `name`."""
        self._pass()
        self._stack.append(name)
        try:
            yield
        finally:
            self._pass()
            self._stack.pop()

    @contextmanager
    def watching(self, owner: Any, attribute: str, name: str) -> Iterator[None]:
        """Counts calls of a function or method for the part `name` while the context is open."""
        original = getattr(owner, attribute)

        def timed(*arguments: Any, **named: Any) -> Any:
            with self.part(name):
                return original(*arguments, **named)

        own = attribute in vars(owner)
        setattr(owner, attribute, timed)
        try:
            yield
        finally:
            if own:
                setattr(owner, attribute, original)
            else:
                delattr(owner, attribute)


class Steppable(Protocol):
    """What a worker steps: `step` reads the loss, `launch` need not, `parts` are (owner, method, name) to time in steps
    that run `plainly` until that is set back."""

    device: Any
    plainly: bool

    def step(self) -> float: ...
    def launch(self) -> Any: ...
    def parts(self) -> list[tuple[Any, str, str]]: ...


class _Trainer:
    """The arm that takes the trainer's own steps."""

    def __init__(self, session: Any) -> None:
        self.session, self.device = session, session.device
        self.plainly = False

    def step(self) -> float:
        return float(self.launch())

    def launch(self) -> Any:
        """A step whose loss stays on the device, as between logging points."""
        from mirai_ds.train.step import train_step

        record = train_step(self.session, self.session.step, self.plainly)
        self.session.count_step()
        return record.metrics["loss"]

    def parts(self) -> list[tuple[Any, str, str]]:
        self.plainly = True  # a captured step has no parts to look at
        s = self.session
        parts: list[tuple[Any, str, str]] = [
            (s, "refresh_teacher", "teacher refresh"), (s.loader, "_read", "data"), (s.engine, "forward", "forward"),
            (s.engine, "backward", "backward"), (s.engine, "step", "optimizer"), (s.engine.ema, "update", "EMA"),
        ]  # fmt: skip
        if s.teacher is not None:
            objective = s.engine.ds.module
            parts += [(s.teacher, "features", "teacher forward"), (objective, "align", "heads and alignment")]
        return parts


class _Plain:
    """The arm that takes the baseline's steps."""

    def __init__(self, config: Any, world: Any, device: Any, compiled: bool) -> None:
        from mirai_ds.benchmarks.plain import PlainTrainer
        from mirai_ds.config.deepspeed_file import batch_arithmetic
        from mirai_ds.data import BatchLoader, DataOrder, load_dataset
        from mirai_ds.train.build import seed_everything
        from mirai_ds.train.teacher import build_teacher

        seed_everything(config.seed)
        dataset = load_dataset(config.data, config.model, str(device))
        order = DataOrder(len(dataset.train), config.train.global_batch_size, config.seed)
        micro, accumulation = batch_arithmetic(config, world.size)
        assert accumulation == 1, "the plain baseline has no accumulation"
        watches = config.foresight.teacher == "encoder"
        self.loader = BatchLoader(dataset.train, order, micro, world.rank, world.size, device, images=watches,
                                  prefetch=2, workers=0)  # fmt: skip
        encoder = build_teacher(config, device)[0] if watches else None
        self.trainer = PlainTrainer(config, device, encoder, compiled)
        self.config, self.device, self.done, self.plainly = config, device, 0, True

    def step(self) -> float:
        from mirai_ds.foresight import alignment_multiplier

        multiplier = alignment_multiplier(self.config.foresight, 0.0, self.config.train.epochs)
        batch = next(iter(self.loader.micro_batches(self.done)))
        self.done += 1
        return self.trainer.step(batch.tokens, batch.labels, batch.images, multiplier)["loss"]

    def launch(self) -> float:
        """It reads its losses in every step."""
        return self.step()

    def parts(self) -> list[tuple[Any, str, str]]:
        t = self.trainer
        return [
            (self.loader, "_read", "data"), (t, "features", "teacher forward"), (t, "forward", "forward"),
            (t, "alignment", "heads and alignment"), (t, "backward", "backward"), (t, "update", "optimizer"),
            (t, "average", "EMA"), (t, "refresh", "teacher refresh"),
        ]  # fmt: skip


def _timed(what: Steppable) -> dict[str, Any]:
    from mirai_ds.runtime.distributed import wait_for_ranks

    wait_for_ranks()
    began = time.perf_counter()
    loss = what.step()  # read from the device: the step is over
    return {"seconds": time.perf_counter() - began, "loss": loss}


def _in_a_row(what: Steppable, steps: int) -> dict[str, float]:
    """Seconds of a step when several are queued and nobody waits between them."""
    what.step()
    began = time.perf_counter()
    for _ in range(steps - 1):
        what.launch()
    loss = what.step()
    return {"seconds": (time.perf_counter() - began) / steps, "loss": loss}


def _parts(what: Steppable) -> dict[str, Any]:
    import torch.distributed as dist

    watch = Stopwatch(what.device)
    with ExitStack() as stack:
        for owner, attribute, name in what.parts():
            stack.enter_context(watch.watching(owner, attribute, name))
        for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast"):
            stack.enter_context(watch.watching(dist, name, "communication"))
        with watch.part("rest"):
            what.step()
    what.plainly = False
    return {"parts": watch.seconds}


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2 (2.33 and later)."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks",
                                                     "fsmblks", "uordblks", "fordblks", "keepcost")]  # fmt: skip


def allocated_by_malloc() -> int:
    """Bytes that this process has asked glibc for and not given back."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = _Mallinfo
    info = ask()
    return int(info.uordblks + info.hblkhd)


def _resident_peak() -> int:
    """The most memory in bytes that this process has held since it began."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmHWM"].split()[0]) * 1024


def _memory(what: Steppable, empty: int) -> dict[str, int]:
    """Bytes beyond `empty`, what the process held before anything was built: before a step, and at most within it.  On
    a GPU the caching allocator's; on a CPU malloc's, looked at every two milliseconds, so that compiled code counts."""
    if what.device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(what.device)
        resting = torch.cuda.memory_allocated(what.device)
        what.plainly = True  # a replay allocates nothing: what it needs is a plain step's
        what.step()
        what.plainly = False
        return {"peak": torch.cuda.max_memory_allocated(what.device), "resting": resting, "resident": 0}
    resting = highest = allocated_by_malloc()
    done = threading.Event()

    def look() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, allocated_by_malloc())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    what.step()
    done.set()
    thread.join()
    return {"peak": highest - empty, "resting": resting - empty, "resident": _resident_peak()}


def serve(job: dict[str, Any]) -> None:
    """One rank: build, then obey until the parent closes the line."""
    import torch

    from mirai_ds.benchmarks.sessions import on_random_data, random_session, shared_folder
    from mirai_ds.config import load
    from mirai_ds.engine.start import start_process_group
    from mirai_ds.runtime.distributed import World, local_device, read_world

    world = read_world() or World(0, 0, 1, 1)
    device = local_device(world)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    start_process_group(world, 10)
    config = load(job["recipe"], job["overrides"])
    with ExitStack() as stack:
        empty = allocated_by_malloc() if device.type == "cpu" else 0
        if job["plain"]:
            folder = stack.enter_context(shared_folder(world))
            compiled = job["settings"].get("compiled", False)
            config = on_random_data(config, folder, world, MAX_STEPS)
            what: Steppable = _Plain(config, world, device, compiled)
        else:
            what = _Trainer(stack.enter_context(random_session(config, world, device, MAX_STEPS)))
        obey(what, empty)


def obey(what: Steppable, empty: int = 0) -> None:
    """Answer the parent's commands until it closes the line; `empty`: bytes held before anything was built."""
    commands: dict[str, Callable[..., dict[str, Any]]] = {
        "step": lambda: _timed(what), "run": lambda steps: _in_a_row(what, steps), "parts": lambda: _parts(what),
        "memory": lambda: _memory(what, empty), "profile": lambda steps: device_time(what.launch, steps),
    }  # fmt: skip
    for line in sys.stdin:
        name, *numbers = line.split()
        print(json.dumps(commands[name](*map(int, numbers))), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # a group whose other ranks are gone must not be waited for
