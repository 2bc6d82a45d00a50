"""Everything a run has in its hands, built once: data, objective, teacher, engine, place in the run."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirai_ds.checkpoint import store
from mirai_ds.checkpoint.format import Snapshot, StateReader
from mirai_ds.checkpoint.llamagen import check_gpt_weights, read_gpt_weights
from mirai_ds.checkpoint.saver import Saver
from mirai_ds.config import ConfigError, RunConfig, UserError, Weights
from mirai_ds.config.deepspeed_file import resolve
from mirai_ds.config.schedule import total_steps
from mirai_ds.data import BatchLoader, DataOrder, Dataset, load_dataset
from mirai_ds.data.loader import auto_workers, warm_page_cache
from mirai_ds.engine.compiled import compile_blocks
from mirai_ds.engine.engine import AverageOf, TrainEngine
from mirai_ds.engine.state import SnapshotBuffers, read_into, restore_rng, take_snapshot
from mirai_ds.foresight import MiraiObjective, Teacher, seam_note
from mirai_ds.model import GPT, gpt_from_weights, initialise
from mirai_ds.runs.lock import RunLock
from mirai_ds.runs.outcome import Verdict
from mirai_ds.runtime.control import Control, Facts
from mirai_ds.runtime.distributed import World, repeatable_cublas
from mirai_ds.runtime.environment import code_version
from mirai_ds.runtime.log import LOG
from mirai_ds.runtime.signals import StopRequests
from mirai_ds.train.agree import on_every_rank
from mirai_ds.train.skipped import SkippedSteps, Stateful
from mirai_ds.train.teacher import build_teacher

MAX_SCORED_SIDE = 64  # the judge is a support vector machine on pixels


@dataclass
class Session:
    """A training run on this rank.  `step` counts finished steps."""

    config: RunConfig
    ds_config: dict[str, Any]
    run: Path
    world: World
    device: torch.device
    dataset: Dataset
    order: DataOrder
    loader: BatchLoader
    engine: TrainEngine
    teacher: Teacher | None
    total_steps: int
    run_lock: RunLock
    control: Control
    stop: StopRequests
    saver: Saver
    data_digest: str
    teacher_digest: str = ""  # of a frozen teacher's weights
    step: int = 0
    applied_steps: int = 0
    batch_offset: int = 0  # batches that rollbacks left out
    saved_step: int = -1  # the step of the newest checkpoint of this state
    log_bytes: int = -1  # where metrics.jsonl ended then; -1: it begins here
    facts: Facts = field(default_factory=Facts)  # what all ranks said before this step
    ended: tuple[Verdict, str] | None = None  # set by a hook: leave the loop
    rewound: bool = False  # the last hook went back to a checkpoint
    measured: dict[str, float] = field(default_factory=dict)  # at this step, for the checkpoint
    skipped: SkippedSteps = field(default_factory=SkippedSteps)
    stateful: dict[str, Stateful] = field(default_factory=dict)  # by name: what checkpoints keep of hooks and guards
    _states: dict[str, Any] = field(default_factory=dict)  # what the checkpoint held of them
    beat: Callable[[str], None] = lambda phase: None  # tells the watchdog
    log_position: Callable[[], int] = lambda: -1
    notes: list[str] = field(default_factory=list)
    _buffers: SnapshotBuffers = field(default_factory=SnapshotBuffers)
    hook_seconds: float = 0.0  # spent by hooks since the last log, so that throughput is the step's alone

    def __post_init__(self) -> None:
        self.keep_state_of("nonfinite", self.skipped)

    def keep_state_of(self, name: str, part: Stateful) -> None:
        """From now on checkpoints keep `part`'s state; it is given what the one that was resumed held of it."""
        self.stateful[name] = part
        part.load_state_dict(copy.deepcopy(self._states.get(name, {})))

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for the run."""
        return self.world.rank == 0

    def count_step(self, applied: bool = True) -> None:
        """One more step is done."""
        self.step += 1
        self.applied_steps += int(applied)

    def go_back(self, steps: int) -> None:
        """The last `steps` steps, counted as applied, changed nothing: they are to be done again."""
        self.step -= steps
        self.applied_steps -= steps
        self.engine.resume_counters(self.step, self.loader.accumulation)

    def refresh_teacher(self) -> None:
        """Let the teacher take what is newer of the run's own average."""
        if self.teacher is not None:
            self.teacher.refresh(AverageOf(self.engine), self.applied_steps)

    @contextmanager
    def plain_gpt(self, kind: Weights) -> Iterator[GPT]:
        """A whole fp32 GPT in eval mode with raw or EMA weights, on every rank; freed afterwards.  Collective."""
        gpt = gpt_from_weights(self.config.model, self.engine.gather_weights(kind))
        with self.autocast():
            yield gpt

    def autocast(self) -> torch.autocast:
        """The precision in which evaluation and sampling run: bf16 matrix products unless the run is fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision != "fp32")

    def save_checkpoint(self) -> None:
        """Collective; does nothing when this state is saved already.  Raises SaveError (`checkpoint.saver`)."""
        if self.saved_step == self.step:
            return
        if self.engine.update.pending_steps:
            raise RuntimeError(
                f"step {self.step} is not confirmed: the hook that saves must say so (`Hook.needs_sync`)"
            )
        self.beat("saving")
        self.saver.save(self.describe_state(), self.take)
        self.saved_step = self.step

    def take(self) -> Snapshot:
        """A copy of this rank's part of the state."""
        return take_snapshot(self.engine, self.world.rank, self._buffers)

    def describe_state(self) -> store.CheckpointInfo:
        """What a checkpoint of this moment holds beside its tensors."""
        c = self.config
        states = {name: copy.deepcopy(state) for name, part in self.stateful.items() if (state := part.state_dict())}
        return store.CheckpointInfo(
            step=self.step, global_batch_size=c.train.global_batch_size, seed=c.seed,
            world_size=self.world.size, zero_stage=self.engine.stage, precision=c.train.precision,
            method=c.foresight.method, code=code_version() if self.is_main else "", applied_steps=self.applied_steps,
            incarnation=self.run_lock.mine.number, data=self.data_digest, batch_offset=self.batch_offset,
            log_bytes=self.log_position(), metrics=dict(self.measured), hooks=states,
            teacher=self.teacher_digest,
        )  # fmt: skip

    def resume(self, request: str) -> None:
        """Continue from a checkpoint; every rank takes the one that rank 0 verified."""
        folder, info, skipped = self._load(request)
        self.notes += skipped
        self.run_lock.note_start(info.step, info.incarnation)
        self.notes.append(f"resumed after step {info.step} from {folder}")

    def roll_back(self, skip_batches: bool) -> int:
        """Collective: return to the newest whole checkpoint, leaving out the batches seen since; its step."""
        self.saver.finish()
        seen = self.step
        _, info, skipped = self._load("auto")
        for note in skipped:
            LOG.info("%s", note)
        if skip_batches:
            self.batch_offset += seen - info.step
        if self.is_main:
            self.run_lock.renew(info.step, info.incarnation)
        self.run_lock.mine = self.control.gather(self.run_lock.mine)[0]
        self.rewound = True
        return info.step

    def _load(self, request: str) -> tuple[str, store.CheckpointInfo, list[str]]:
        """Name and info of the checkpoint that was taken, and a line for each that was passed over."""
        self.beat("loading")
        found: list[Any] = [None, None, None, ""]
        if self.is_main:
            try:
                folder, info, skipped = store.find(self.run, request)
                found = [str(folder), info, skipped, ""]
            except UserError as error:
                found[3] = str(error)
        name, info, skipped, problem = self.control.gather(found)[0]
        if problem:
            raise UserError(problem)
        self._check_same_data(info, name)
        reader = StateReader(Path(name))
        read_into(self.engine, reader)
        restore_rng(reader.rng(self.world.rank), self.device)
        self.step = self.saved_step = info.step
        self.applied_steps, self.batch_offset, self.log_bytes = info.applied_steps, info.batch_offset, info.log_bytes
        self._states, self.measured = info.hooks, dict(info.metrics)
        for name_of_part, part in self.stateful.items():
            self.keep_state_of(name_of_part, part)
        self.engine.resume_counters(self.step, self.loader.accumulation)
        return name, info, [f"skipped {reason}" for reason in skipped]

    def _check_same_data(self, info: store.CheckpointInfo, folder: str) -> None:
        for name, now in (("seed", self.config.seed), ("global_batch_size", self.config.train.global_batch_size)):
            then = getattr(info, name)
            if then != now:
                raise UserError(
                    f"{folder}: was written with {name} = {then}, this run has {now}; the data order would change"
                )
        if info.data and info.data != self.data_digest:
            raise UserError(
                f"{folder}: was trained on other codes or labels (digest {info.data[:12]}) than data.path = "
                f"{self.config.data.path!r} holds now ({self.data_digest[:12]}); give the data it began with"
            )
        if info.teacher and info.teacher != self.teacher_digest:
            raise UserError(
                f"{folder}: was trained with another teacher (digest {info.teacher[:12]}) than "
                f"foresight.teacher_weights = {self.config.foresight.teacher_weights!r} holds now "
                f"({self.teacher_digest[:12]}); give the weights it began with (of a run that went on: its checkpoint "
                "folder)"
            )


def build_session(
    config: RunConfig, run: Path, world: World, device: torch.device, run_lock: RunLock, stop: StopRequests
) -> Session:
    """Build data, objective, teacher and engine.  The process group must exist.  Raises UserError."""
    seed_everything(config.seed)
    if config.train.deterministic:
        repeatable_cublas()
        # Not `warn_only`: torch would then go on choosing attention whose backward pass adds in any order.
        torch.use_deterministic_algorithms(True)
        # Else torch fills every buffer that it hands out: a fifth of GPT-B's step on a CPU, most of it in DeepSpeed.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    ds_config = resolve(config, world.size, cpu=device.type == "cpu")
    dataset = on_every_rank(lambda: load_dataset(config.data, config.model, str(device)))
    order = DataOrder(len(dataset.train), config.train.global_batch_size, config.seed)
    if order.steps_per_epoch == 0:
        raise UserError(
            f"train.global_batch_size = {order.global_batch_size}: the training set has only {order.num_samples} images"
        )
    check_score(config, dataset)
    if world.local_rank == 0:
        warm_page_cache(dataset.train)
    teacher, teacher_digest, note = on_every_rank(lambda: build_teacher(config, device))
    objective = MiraiObjective(
        config.model, config.foresight, teacher.feature_dim if teacher else None,
        ds_config["gradient_accumulation_steps"],
    )  # fmt: skip
    initialise(objective, config.seed, config.model.init_std)
    engine = TrainEngine(objective, config, ds_config, device)
    if config.train.compile == "blocks" and teacher is not None:
        compile_blocks(teacher.blocks)
    if config.train.init_from:
        engine.load_weights(initial_weights(config))
    watches = teacher is not None and teacher.reads_images
    loader = BatchLoader(
        dataset.train, order, ds_config["train_micro_batch_size_per_gpu"], world.rank, world.size, device,
        images=watches, prefetch=config.data.prefetch,
        workers=auto_workers(watches, world.local_size) if config.data.workers is None else config.data.workers,
    )  # fmt: skip
    steps = total_steps(config.train, order.steps_per_epoch)
    control = Control(config.launch.timeout_minutes)
    saver = Saver(run, world.rank, run_lock, control, config.checkpoint)
    stop.is_saving = lambda: saver.in_flight >= 0
    session = Session(
        config, ds_config, run, world, device, dataset, order, loader, engine, teacher, steps, run_lock, control, stop,
        saver, dataset.train.digest(), teacher_digest,
    )  # fmt: skip
    stop.unsaved_steps = lambda: session.step - max(session.saved_step, 0)
    session.notes += note
    if not len(dataset.held_out) and (config.eval.loss.at_end or config.eval.loss.every_steps):
        session.notes.append("no held-out samples, no held-out loss: give data.held_out_path or held_out_fraction")
    seams = seam_note(config.foresight, config.model)
    session.notes += [seams] if seams else []
    return session


def seed_everything(seed: int) -> None:
    """Training draws from no generator; user code may, and then two runs should draw alike."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def check_score(config: RunConfig, dataset: Dataset) -> None:
    """Whether a classifier can judge generated images of this data; raises ConfigError."""
    if not config.eval.classifier.enabled:
        return
    decoder = dataset.train.decoder
    if decoder is None:
        raise ConfigError(
            "eval.classifier.enabled", True, "the data has no `codebook` to turn tokens into images; set it to false"
        )
    side = decoder.downsampling * config.model.grid
    if side > MAX_SCORED_SIDE:
        problem = f"is for images up to {MAX_SCORED_SIDE} pixels, these have {side}; set it to false"
        raise ConfigError("eval.classifier.enabled", True, problem)
    if len(dataset.held_out) == 0:
        raise ConfigError(
            "eval.classifier.enabled", True, "needs held-out images; set data.held_out_fraction or turn it off"
        )


def initial_weights(config: RunConfig) -> dict[str, Tensor]:
    """`train.init_from`: a weights file, or a run folder whose newest whole checkpoint gives its raw weights."""
    path = Path(config.train.init_from or "")
    if path.is_dir():
        reader = StateReader(store.find(path, "auto")[0])
        weights = reader.weights("master") | {
            f"projectors.{name}": value for name, value in reader.weights("master", "projectors.").items()
        }
    else:
        weights = read_gpt_weights(path)
    check_gpt_weights(weights, config.model, path)
    return weights
