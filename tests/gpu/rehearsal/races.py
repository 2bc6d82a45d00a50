"""Stream races in training steps, by torch's CUDA sanitizer: accesses of two streams that nothing orders.

python -m tests.gpu.rehearsal.races CASES.json RESULTS.json
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.cuda import _sanitizer

from mirai_ds.benchmarks.sessions import random_session
from mirai_ds.config import build
from mirai_ds.engine import layout
from mirai_ds.engine.start import start_process_group
from mirai_ds.runtime.distributed import World
from mirai_ds.runtime.launch import free_port
from tests.gpu.rehearsal.steps import one_step

STEPS = 3


class Collector(_sanitizer.EventHandler):
    """Counts races instead of ending at the first: they come in dozens, and their places are what helps."""

    def __init__(self) -> None:
        super().__init__()
        self.races: Counter[str] = Counter()
        self.streams: Counter[int] = Counter()

    def _handle_kernel_launch(self, stream: int, *arguments: Any, **named: Any) -> list[Any]:
        self.streams[stream] += 1
        for error in super()._handle_kernel_launch(stream, *arguments, **named):
            now, before = error.current_access, error.previous_access
            self.races[f"{_place(now)} against {_place(before)}"] += 1
        return []


def _place(access: Any) -> str:
    """The operator, and the innermost line of DeepSpeed or the project."""
    frames = [f for f in access.stack_trace if "/deepspeed/" in f.filename or "/mirai_ds/" in f.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{str(access.operator).split('(')[0]} at {where}"


def run_case(settings: dict[str, Any], world: World) -> dict[str, Any]:
    """Races of some steps, and how many launches were watched on how many streams.

    A setting `without_join` leaves out what orders the reduction's stream and the update's: then there must be races.
    """
    without_join = settings.pop("without_join", False)
    join = layout.join
    with random_session(build(settings), world, torch.device("cuda", 0), STEPS + 1) as session:
        one_step(session, [], [])  # engines copy and allocate in their first step what they keep
        mode = _sanitizer.CUDASanitizerDispatchMode.__new__(_sanitizer.CUDASanitizerDispatchMode)
        collector = Collector()
        _sanitizer.EventHandler, kept = (lambda: collector), _sanitizer.EventHandler  # type: ignore[misc,assignment]
        mode.__init__()  # type: ignore[misc]
        _sanitizer.EventHandler = kept  # type: ignore[misc]
        try:
            if without_join:
                layout.join = lambda *_: None
            with mode:
                for _ in range(STEPS):
                    one_step(session, [], [])
        finally:
            layout.join = join
    return {
        "races": dict(collector.races.most_common(20)), "launches": sum(collector.streams.values()),
        "streams": len(collector.streams),
    }  # fmt: skip


def main(case: Path, result: Path) -> None:
    """One case a process: the sanitizer's hooks stay for good."""
    os.environ["MASTER_PORT"] = str(free_port())
    world = World(0, 0, 1, 1)
    start_process_group(world, 5)
    result.write_text(json.dumps(run_case(json.loads(case.read_text(encoding="utf-8")), world)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
