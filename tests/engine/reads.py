"""What a training step reads from tensors, for ranks of a pool."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from mirai_ds.benchmarks.sessions import random_session
from mirai_ds.runtime.distributed import World
from mirai_ds.train.step import train_step
from tests.engine.cases import toy_config


class DeviceReads(TorchDispatchMode):
    """Counts values read from tensors (`.item()`, `bool`, `float`, `tolist` of one), by the package that reads."""

    def __init__(self) -> None:
        super().__init__()
        self.by: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            names = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_stack(sys._getframe(1)))
            package = next((n.partition(".")[0] for n in names if n.partition(".")[0] in ("mirai_ds", "deepspeed")), "")
            self.by[package] = self.by.get(package, 0) + 1
        return func(*args, **(kwargs or {}))


def reads_case(method: str, stage: int, precision: str) -> dict[str, int]:
    """Values read from tensors in one training step between logging points."""
    rank, world = dist.get_rank(), dist.get_world_size()
    config = toy_config(method, stage, precision, 2)
    with random_session(config, World(rank, rank, world, world), torch.device("cpu"), 4) as session:
        for step in range(2):
            train_step(session, step)
            session.count_step()
        batches = list(session.loader.micro_batches(2))
        session.loader.micro_batches = lambda step: iter(batches)  # type: ignore[method-assign, assignment]
        with DeviceReads() as reads:
            train_step(session, 2)
        assert session.engine.confirm_updates() == 0
    return reads.by
