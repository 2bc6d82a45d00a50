"""Whole training steps as CUDA graphs: one launch in place of thousands, which a host cannot hand out in time.

A step can be captured as it is because nothing in it asks the device (`update.py`), dropout is a function of keys that
are inputs, and what changes from step to step lies in device memory: batches, learning rates, the multiplier and the
count of updates.  What decides which operations run is the step's *kind*; each kind has a graph.  All graphs take their
memory from one pool: a step leaves nothing in it that the next one needs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mirai_ds.engine.engine import TrainEngine
from mirai_ds.engine.host_state import HostState
from mirai_ds.foresight import Teacher
from mirai_ds.runtime.control import Control
from mirai_ds.runtime.log import LOG

# Plain steps of a kind before it is captured: compilation, AdamW's moments, libraries' workspaces and DeepSpeed's
# buckets come into being in the first ones, and none of that may happen inside a capture.
WARM_STEPS = 3

Inputs = tuple[Tensor | None, ...]  # of a micro-batch
Body = Callable[[Sequence[Inputs], Tensor], dict[str, Tensor]]


class _Captured(NamedTuple):
    """numbers: all results in one tensor, which the next replay overwrites; shapes: by name, in its order."""

    graph: torch.cuda.CUDAGraph
    numbers: Tensor
    shapes: dict[str, torch.Size]


def why_plain(engine: TrainEngine, teacher: Teacher | None) -> str | None:
    """Why the steps of an engine with this teacher cannot be captured; None: they can be."""
    if engine.config.train.cuda_graph == "off":
        return "train.cuda_graph is off"
    if engine.device.type != "cuda":
        return "there is no GPU"
    if engine.update.offloaded:
        return "the optimizer is in host memory"
    if engine.stage == 3:
        return "ZeRO-3 asks the device while it gathers"
    if teacher is not None and not teacher.capturable:
        return f"{type(teacher).__name__} is not `capturable`"
    recompute = engine.config.train.recompute
    if recompute.policy != "none" and recompute.implementation == "deepspeed":
        return "DeepSpeed's recomputation saves the state of random generators"
    return None


def enter_capturable_stream(device: torch.device) -> None:
    """Before the engine is built: the default stream cannot be captured, and autograd runs what it does for a parameter
    on the stream that was current when its hooks were made."""
    torch.cuda.set_stream(_stream(device))


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all engines of a process: cuBLAS keeps a workspace for each stream it has seen."""
    return torch.cuda.Stream(device)


class StepGraphs:
    """The captured steps of one engine.  All methods are collective."""

    def __init__(self, engine: TrainEngine, teacher: Teacher | None, control: Control) -> None:
        self.engine, self.control = engine, control
        self.problem = why_plain(engine, teacher) or ""  # why steps run plainly
        self._plain: dict[Hashable, int] = {}  # steps of each kind that ran plainly
        self._graphs: dict[Hashable, _Captured] = {}
        self._inputs: list[Inputs] = []
        self._multiplier, self._multiplier_there = torch.zeros((), device=engine.device), 0.0
        self._pool = torch.cuda.graph_pool_handle() if not self.problem else None

    def forget(self) -> None:
        """The state was loaded anew, so that graphs may hold addresses of what is gone: capture again."""
        self._plain.clear()
        self._graphs.clear()

    def run(
        self, kind: Hashable, step: int, batches: Callable[[], Sequence[Inputs]], multiplier: float, body: Body
    ) -> dict[str, Tensor] | None:
        """Make 0-based step `step`, of micro-batches in pinned memory; its results, or None: run it plainly.

        body: the step on given device tensors and multiplier.  The same kind means the same operations and shapes; all
        ranks ask for the same kind at the same step.
        """
        if self.problem:
            return None
        if kind not in self._graphs:
            self._plain[kind] = self._plain.get(kind, 0) + 1
            if self._plain[kind] <= WARM_STEPS:
                return None
        self._fill(batches(), multiplier)
        if kind not in self._graphs and not self._capture(kind, body):
            return None
        captured = self._graphs[kind]
        captured.graph.replay()
        self.engine.count_replayed(step)
        parts = captured.numbers.clone().split([shape.numel() for shape in captured.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(captured.shapes.items(), parts, strict=True)}

    def _fill(self, batches: Sequence[Inputs], multiplier: float) -> None:
        """Queued behind the last replay, so that nothing it still reads is overwritten; the host does not wait."""
        if not self._inputs:
            self._inputs = [
                tuple(None if t is None else torch.empty_like(t, device=self.engine.device) for t in batch)
                for batch in batches
            ]
        for held, batch in zip(self._inputs, batches, strict=True):
            for mine, given in zip(held, batch, strict=True):
                if mine is not None and given is not None:
                    mine.copy_(given, non_blocking=True)
        if multiplier != self._multiplier_there:
            self._multiplier.copy_(torch.tensor(multiplier).pin_memory(), non_blocking=True)
            self._multiplier_there = multiplier

    def _capture(self, kind: Hashable, body: Body) -> bool:
        """Whether all ranks could; if any cannot, no rank will from now on."""
        engine = self.engine
        state = HostState(
            (engine.ds, engine.ds.optimizer, engine.layout.base_optimizer, engine.update, engine.ema),
            engine.ds.module.parameters(),
        )
        graph, problem = torch.cuda.CUDAGraph(), ""
        try:
            # Other threads (the one that pins batches, the watchdog's) go on calling CUDA meanwhile: thread_local.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
            ):
                results = body(self._inputs, self._multiplier)
                numbers = torch.cat([value.float().flatten() for value in results.values()])
            self._graphs[kind] = _Captured(graph, numbers, {name: value.shape for name, value in results.items()})
        except Exception as error:
            problem = _reason(error)
        state.restore()
        problems = [text for text in self.control.gather(problem) if text]
        if problems:
            self._graphs.clear()
            self.problem = problems[0]
            LOG.warning("the step cannot be captured as a CUDA graph (%s); steps run plainly, and slower", problems[0])
        return not problems


def _reason(error: BaseException) -> str:
    """The first cause: ending a broken capture raises another error, which says nothing."""
    first: Any = error
    while first.__context__ is not None:
        first = first.__context__
    return f"{type(first).__name__}: {(str(first).splitlines() or [''])[0]}"
