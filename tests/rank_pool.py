"""A pool of ranks that runs many cases, forked from a warm process (`tests/warm.py`): joining a group costs more than a
toy case."""

from __future__ import annotations

import importlib
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tests.warm import warm_context


class RankFailureError(AssertionError):
    """A case failed on a rank; holds that rank's traceback."""


def _serve(rank: int, world: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), LOCAL_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    import torch

    from mirai_ds.engine.start import start_process_group
    from mirai_ds.runtime.distributed import World

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    start_process_group(World(rank, rank, world, world), timeout_minutes=5)
    while True:
        job = pipe.recv()
        if job is None:
            return
        module, name, args, kwargs = job
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class RankPool:
    """`world` processes that have joined one gloo group."""

    def __init__(self, world: int) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        context = warm_context()
        self.world, self.pipes, self.processes = world, [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, port, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call a module-level function on every rank; the list of what the ranks returned."""
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__name__, args, kwargs))
        results = []
        for rank, pipe in enumerate(self.pipes):
            while not pipe.poll(1.0):
                dead = [r for r, p in enumerate(self.processes) if not p.is_alive()]
                if dead:
                    raise RankFailureError(f"rank {dead[0]} died in {function.__name__}")
            ok, value = pipe.recv()
            results.append((rank, ok, value))
        for rank, ok, value in results:
            if not ok:
                raise RankFailureError(f"rank {rank}:\n{value}")
        return [value for _, _, value in results]

    def close(self) -> None:
        """End the ranks."""
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(timeout=10)
            process.kill()
