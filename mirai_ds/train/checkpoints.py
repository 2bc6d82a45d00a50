"""Saving, resuming and rolling back a run: the engine's state, the hooks', and the place in the run, together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirai_ds.checkpoint import store
from mirai_ds.checkpoint.format import Snapshot, StateReader
from mirai_ds.checkpoint.saver import Saver
from mirai_ds.config import RunConfig, UserError
from mirai_ds.engine.engine import TrainEngine
from mirai_ds.engine.state import SnapshotBuffers, read_into, restore_rng, take_snapshot
from mirai_ds.runs.lock import RunLock
from mirai_ds.runtime.control import Control
from mirai_ds.runtime.distributed import World
from mirai_ds.runtime.environment import code_version
from mirai_ds.runtime.log import LOG
from mirai_ds.train.resume_rules import check_changes, is_allowed
from mirai_ds.train.skipped import Stateful


@dataclass
class Progress:
    """Where a run is: what steps change and a resume restores."""

    step: int = 0  # finished steps
    applied_steps: int = 0  # of them, those that updated the weights
    batch_offset: int = 0  # batches that rollbacks left out
    log_bytes: int = -1  # where metrics.jsonl ended at the checkpoint; -1: it begins here
    measured: dict[str, float] = field(default_factory=dict)  # by hooks at this step


@dataclass(frozen=True)
class Origin:
    """What the numbers of a run come from, beside its configuration: digests that a resume must find again."""

    data: str
    teacher: str = ""  # of a frozen teacher's weights


class Checkpoints:
    """The checkpoints of one run.  All methods but `keep_state_of` and `take` are collective."""

    def __init__(
        self, config: RunConfig, saver: Saver, control: Control, run_lock: RunLock, engine: TrainEngine, world: World,
        origin: Origin,
    ) -> None:  # fmt: skip
        self.config, self.saver, self.control, self.run_lock = config, saver, control, run_lock
        self.engine, self.world, self.origin = engine, world, origin
        self.progress = Progress()
        self.saved_step = -1  # the step of the newest checkpoint of this state
        self.log_position: Callable[[], int] = lambda: -1  # where metrics.jsonl ends now
        self.rollbacks = 0  # of this process: how the loop learns that a hook went back
        self._stateful: dict[str, Stateful] = {}
        self._loaded: dict[str, Any] = {}  # states that the resumed checkpoint held, by name
        self._buffers = SnapshotBuffers()

    def keep_state_of(self, name: str, part: Stateful) -> None:
        """From now on checkpoints keep `part`'s state; it is given what the one that was resumed held of it."""
        self._stateful[name] = part
        part.load_state_dict(copy.deepcopy(self._loaded.get(name, {})))

    def save(self) -> None:
        """Does nothing when this state is saved already.  Raises SaveError (`checkpoint.saver`)."""
        if self.saved_step == self.progress.step:
            return
        if self.engine.update.pending_steps:
            raise RuntimeError(
                f"step {self.progress.step} is not confirmed: the hook that saves must say so (`Hook.needs_sync`)"
            )
        self.saver.save(self.describe(), self.take)
        self.saved_step = self.progress.step

    def save_aside(self, folder: Path) -> list[str]:
        """Write this state into a folder that no resume looks at; what went wrong."""
        return self.saver.save_aside(folder, self.describe(), self.take)

    def take(self) -> Snapshot:
        """A copy of this rank's part of the state."""
        return take_snapshot(self.engine, self.world.rank, self._buffers)

    def describe(self) -> store.CheckpointInfo:
        """What a checkpoint of this moment holds beside its tensors."""
        config, progress = self.config, self.progress
        states = {name: copy.deepcopy(state) for name, part in self._stateful.items() if (state := part.state_dict())}
        return store.CheckpointInfo(
            step=progress.step, global_batch_size=config.train.global_batch_size, seed=config.seed,
            world_size=self.world.size, zero_stage=self.engine.stage, precision=config.train.precision,
            method=config.foresight.method, code=code_version() if self.world.rank == 0 else "",
            applied_steps=progress.applied_steps, incarnation=self.run_lock.mine.number, data=self.origin.data,
            batch_offset=progress.batch_offset, log_bytes=self.log_position(), metrics=dict(progress.measured),
            hooks=states, teacher=self.origin.teacher, config=config.model_dump(mode="json"),
        )  # fmt: skip

    def resume(self, request: str, allowed: Iterable[str] = ()) -> None:
        """Continue from the checkpoint of step `request`, or the newest whole one (`auto`), which rank 0 verifies and
        every rank takes.  Raises UserError where there is none, it is of other data or another teacher, or a field of
        the configuration has changed that must not (`resume_rules`) and is not in `allowed`."""
        folder, info = self._load(request, allowed)
        self.run_lock.note_start(info.step, info.incarnation)
        LOG.info("resumed after step %d from %s", info.step, folder)

    def roll_back(self, skip_batches: bool) -> int:
        """Return to the newest whole checkpoint, leaving out the batches seen since if asked to; its step."""
        self.saver.finish()
        seen = self.progress.step
        _, info = self._load("auto")
        if skip_batches:
            self.progress.batch_offset += seen - info.step
        if self.world.rank == 0:
            # The lock's number changes, so that what this branch wrote after the checkpoint is known to be left behind.
            self.run_lock.renew(info.step, info.incarnation)
        self.run_lock.mine = self.control.gather(self.run_lock.mine)[0]
        self.rollbacks += 1
        return info.step

    def _load(self, request: str, allowed: Iterable[str] = ()) -> tuple[str, store.CheckpointInfo]:
        """Fill everything from a checkpoint; its folder and info.  Those passed over are logged with the reason."""
        mine: tuple[str, store.CheckpointInfo | None, list[str], str] = ("", None, [], "")
        if self.world.rank == 0:
            try:
                folder, newest, passed_over = store.find(self.saver.run, request)
                told = check_changes(store.config_of(folder, newest), self.config, str(folder), allowed)
                notes = [f"skipped {reason}" for reason in passed_over] + [f"changed since: {text}" for text in told]
                mine = (str(folder), newest, notes, "")
            except UserError as error:
                mine = ("", None, [], str(error))
        name, info, notes, problem = self.control.gather(mine)[0]
        if info is None:
            raise UserError(problem)
        for note in notes:
            LOG.info("%s", note)
        self._check_origin(info, name, allowed)
        reader = StateReader(Path(name))
        read_into(self.engine, reader)
        restore_rng(reader.rng(self.world.rank), self.engine.device)
        self.saved_step = info.step
        progress = self.progress
        progress.step, progress.applied_steps, progress.batch_offset = info.step, info.applied_steps, info.batch_offset
        progress.log_bytes, progress.measured = info.log_bytes, dict(info.metrics)
        self._loaded = info.hooks
        for name_of_part, part in self._stateful.items():
            self.keep_state_of(name_of_part, part)
        self.engine.resume_counters(progress.step)
        return name, info

    def _check_origin(self, info: store.CheckpointInfo, folder: str, allowed: Iterable[str] = ()) -> None:
        config = self.config
        if info.data and info.data != self.origin.data and not is_allowed("data.path", allowed):
            raise UserError(
                f"{folder}: was trained on other codes or labels (digest {info.data[:12]}) than data.path = "
                f"{config.data.path!r} holds now ({self.origin.data[:12]}); give the data it began with, or say "
                "--allow-change data.path"
            )
        moved = is_allowed("foresight.teacher_weights", allowed)
        if info.teacher and info.teacher != self.origin.teacher and not moved:
            raise UserError(
                f"{folder}: was trained with another teacher (digest {info.teacher[:12]}) than "
                f"foresight.teacher_weights = {config.foresight.teacher_weights!r} holds now "
                f"({self.origin.teacher[:12]}); give the weights it began with (of a run that went on: its checkpoint "
                "folder), or say --allow-change foresight.teacher_weights"
            )
