"""A run on this rank: its parts, and where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mirai_ds.config import RunConfig, Weights
from mirai_ds.config.schedule import total_steps
from mirai_ds.data import BatchLoader, DataOrder, Dataset
from mirai_ds.engine.engine import AverageOf, TrainEngine
from mirai_ds.engine.step_graphs import StepGraphs
from mirai_ds.foresight import Teacher
from mirai_ds.model import GPT, gpt_from_weights
from mirai_ds.runs.lock import RunLock
from mirai_ds.runs.outcome import Verdict
from mirai_ds.runtime.control import Control
from mirai_ds.runtime.distributed import World
from mirai_ds.runtime.signals import StopRequests
from mirai_ds.train.checkpoints import Checkpoints, Progress
from mirai_ds.train.skipped import SkippedSteps


@dataclass
class Session:
    """What `train.build` made of a configuration; hooks and the loop share it."""

    config: RunConfig
    run: Path
    world: World
    device: torch.device
    dataset: Dataset
    loader: BatchLoader
    engine: TrainEngine
    teacher: Teacher | None
    control: Control
    stop: StopRequests
    run_lock: RunLock
    checkpoints: Checkpoints
    graphs: StepGraphs
    skipped: SkippedSteps = field(default_factory=SkippedSteps)
    beat: Callable[[str], None] = lambda phase: None  # tells the watchdog what this rank is about to do
    ended: tuple[Verdict, str] | None = None  # set by a hook: leave the loop
    early_end: int | None = None  # set by a hook: the run is finished after this step
    hook_seconds: float = 0.0  # spent by hooks since the last log, so that throughput is the step's alone

    def __post_init__(self) -> None:
        self.checkpoints.keep_state_of("nonfinite", self.skipped)

    @property
    def progress(self) -> Progress:
        """Where the run is."""
        return self.checkpoints.progress

    @property
    def step(self) -> int:
        """Finished steps."""
        return self.progress.step

    @property
    def order(self) -> DataOrder:
        """Which samples each step holds."""
        return self.loader.cut.order

    @property
    def total_steps(self) -> int:
        """The step after which the run is finished."""
        whole = total_steps(self.config.train, self.order.steps_per_epoch)
        return whole if self.early_end is None else min(whole, self.early_end)

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for the run."""
        return self.world.rank == 0

    def count_step(self, applied: bool = True) -> None:
        """One more step is done."""
        self.progress.step += 1
        self.progress.applied_steps += int(applied)

    def go_back(self, steps: int) -> None:
        """The last `steps` steps, counted as applied, changed nothing: they are to be done again."""
        self.progress.step -= steps
        self.progress.applied_steps -= steps
        self.engine.resume_counters(self.step)

    def refresh_teacher(self) -> None:
        """Let the teacher take what is newer of the run's own average.  Collective."""
        if self.teacher is not None:
            self.teacher.refresh(AverageOf(self.engine), self.progress.applied_steps)

    def save_checkpoint(self) -> None:
        """Collective; does nothing when this state is saved already.  Raises SaveError (`checkpoint.saver`)."""
        self.beat("saving")
        self.checkpoints.save()

    @contextmanager
    def plain_gpt(self, kind: Weights) -> Iterator[GPT]:
        """A whole fp32 GPT in eval mode with raw or EMA weights, on every rank; freed afterwards.  Collective."""
        gpt = gpt_from_weights(self.config.model, self.engine.gather_weights(kind))
        with self.autocast():
            yield gpt

    def autocast(self) -> torch.autocast:
        """The precision in which evaluation and sampling run: bf16 matrix products unless the run is fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision != "fp32")
