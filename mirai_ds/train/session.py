"""Everything a run has in its hands, built once: data, objective, teacher, engine, place in the run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from mirai_ds.checkpoint import store
from mirai_ds.checkpoint.foreign import check_gpt_weights, read_gpt_weights
from mirai_ds.checkpoint.shard_files import StateReader, read_into, restore_rng, write_rank
from mirai_ds.config import ConfigError, RunConfig, UserError, Weights, dump
from mirai_ds.config.deepspeed_file import resolve
from mirai_ds.data import BatchLoader, DataOrder, Dataset, load_dataset
from mirai_ds.data.loader import auto_workers, warm_page_cache
from mirai_ds.engine.engine import TrainEngine
from mirai_ds.foresight import EmaTeacher, EncoderTeacher, MiraiObjective, Teacher
from mirai_ds.kernels.build import say_on_stderr
from mirai_ds.kernels.foresight_cosine import choose
from mirai_ds.model import GPT, gpt_from_weights, initialise
from mirai_ds.runtime.distributed import World
from mirai_ds.runtime.environment import code_version, describe
from mirai_ds.train.schedule import total_steps

T = TypeVar("T")

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
    step: int = 0
    applied_steps: int = 0
    notes: list[str] = field(default_factory=list)
    hook_seconds: float = 0.0  # spent by hooks since the last log, so that throughput is the step's alone
    _teacher_version: int = -1

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for the run."""
        return self.world.rank == 0

    def refresh_teacher(self) -> None:
        """Give the EMA teacher the newest average; nothing for other teachers or when it is up to date."""
        if not isinstance(self.teacher, EmaTeacher) or self._teacher_version == self.engine.ema.version:
            return
        names = {f"gpt.{name}" for name in self.teacher.names}
        dtype = next(self.teacher.trunk.parameters()).dtype
        gathered = self.engine.gather_named("ema", dtype, names)
        self.teacher.load((name.removeprefix("gpt."), tensor) for name, tensor in gathered)
        self._teacher_version = self.engine.ema.version

    @contextmanager
    def plain_gpt(self, kind: Weights) -> Iterator[GPT]:
        """A whole fp32 GPT in eval mode with raw or EMA weights, on every rank; freed afterwards.  Collective."""
        gpt = gpt_from_weights(self.config.model, self.engine.gather_weights(kind))
        with self.autocast():
            yield gpt

    def autocast(self) -> torch.autocast:
        """The precision in which evaluation and sampling run: bf16 matrix products unless the run is fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision != "fp32")

    def save_checkpoint(self) -> Path:
        """Collective; see `checkpoint.store.save`."""
        c = self.config
        info = store.CheckpointInfo(
            step=self.step, global_batch_size=c.train.global_batch_size, seed=c.seed,
            samples_in_epoch=self.step % self.order.steps_per_epoch * c.train.global_batch_size,
            world_size=self.world.size, zero_stage=self.engine.stage, precision=c.train.precision,
            method=c.foresight.method, code=code_version() if self.is_main else "", applied_steps=self.applied_steps,
        )  # fmt: skip
        return store.save(
            self.run, info, lambda folder: write_rank(folder, self.engine, self.world.rank), c.checkpoint.keep_last
        )

    def resume(self, request: str) -> None:
        """Continue from a checkpoint; every rank takes the one that rank 0 verified."""
        choice: list[Any] = [None, None]
        if self.is_main:
            try:
                folder, info, skipped = store.find(self.run, request)
                choice = [(str(folder), info, skipped), None]
            except UserError as error:
                choice = [None, str(error)]
        dist.broadcast_object_list(choice, src=0)
        if choice[1] is not None:
            raise UserError(choice[1])
        folder_name, info, skipped = choice[0]
        self._check_same_data(info, folder_name)
        reader = StateReader(Path(folder_name))
        read_into(self.engine, reader)
        restore_rng(reader.rng(self.world.rank), self.device)
        self.step, self.applied_steps = info.step, info.applied_steps
        self.engine.resume_counters(self.step, self.loader.accumulation)
        self.notes += [f"skipped {reason}" for reason in skipped] + [
            f"resumed after step {info.step} from {folder_name}"
        ]

    def _check_same_data(self, info: store.CheckpointInfo, folder: str) -> None:
        for name, now in (("seed", self.config.seed), ("global_batch_size", self.config.train.global_batch_size)):
            then = getattr(info, name)
            if then != now:
                raise UserError(
                    f"{folder}: was written with {name} = {then}, this run has {now}; the data order would change"
                )


def build_session(config: RunConfig, run: Path, world: World, device: torch.device) -> Session:
    """Build data, objective, teacher and engine.  The process group must exist.  Raises UserError."""
    torch.manual_seed(config.seed)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    ds_config = resolve(config, world.size)
    dataset = on_every_rank(lambda: load_dataset(config.data, config.model, str(device)))
    order = DataOrder(len(dataset.train), config.train.global_batch_size, config.seed)
    if order.steps_per_epoch == 0:
        raise UserError(
            f"train.global_batch_size = {order.global_batch_size}: the training set has only {order.num_samples} images"
        )
    check_score(config, dataset)
    if world.local_rank == 0:
        warm_page_cache(dataset.train)
    teacher = on_every_rank(lambda: build_teacher(config, device))
    objective = MiraiObjective(
        config.model, config.foresight, teacher.feature_dim if teacher else None,
        ds_config["gradient_accumulation_steps"],
    )  # fmt: skip
    initialise(objective, config.seed, config.model.init_std)
    engine = TrainEngine(objective, config, ds_config, device)
    if config.train.init_from:
        engine.load_weights(initial_weights(config))
    watches = config.foresight.method == "mirai-i"
    loader = BatchLoader(
        dataset.train, order, ds_config["train_micro_batch_size_per_gpu"], world.rank, world.size, device,
        images=watches, prefetch=config.data.prefetch,
        workers=auto_workers(watches, world.local_size) if config.data.workers is None else config.data.workers,
    )  # fmt: skip
    steps = total_steps(config.train, order.steps_per_epoch)
    session = Session(config, ds_config, run, world, device, dataset, order, loader, engine, teacher, steps)
    if not len(dataset.held_out) and (config.evaluate.at_end or config.evaluate.every_steps):
        session.notes.append("no held-out samples, no held-out loss: give data.held_out_path or held_out_fraction")
    return session


def check_score(config: RunConfig, dataset: Dataset) -> None:
    """Whether a classifier can judge generated images of this data; raises ConfigError."""
    if not config.score.enabled:
        return
    decoder = dataset.train.decoder
    if decoder is None:
        raise ConfigError(
            "score.enabled", True, "the data has no `codebook` to turn tokens into images; set it to false"
        )
    side = decoder.downsampling * config.model.grid
    if side > MAX_SCORED_SIDE:
        problem = f"is for images up to {MAX_SCORED_SIDE} pixels, these have {side}; set it to false"
        raise ConfigError("score.enabled", True, problem)
    if len(dataset.held_out) == 0:
        raise ConfigError("score.enabled", True, "needs held-out images; set data.held_out_fraction or turn it off")


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


def build_teacher(config: RunConfig, device: torch.device) -> Teacher | None:
    """The teacher of the configured method, without weights yet for mirai-e."""
    foresight, precision = config.foresight, config.train.precision
    if foresight.method == "mirai-e":
        low = foresight.teacher_dtype == "bf16" or (foresight.teacher_dtype == "auto" and precision == "bf16")
        autocast = foresight.teacher_dtype == "auto" and precision == "bf16-autocast"
        return EmaTeacher(config.model, foresight, torch.bfloat16 if low else torch.float32, device, autocast)
    if foresight.method == "mirai-i":
        assert foresight.encoder is not None
        return EncoderTeacher(foresight.encoder, config.model.grid, device)
    return None


def agree_on_kernel(config: RunConfig, device: torch.device, world: World) -> str | None:
    """Collective: what computes the alignment loss (`cpu`, `cuda`, `reference`), compiled if need be; None without one.
    One rank a node speaks.  Raises on every rank what went wrong on any."""
    if not config.foresight.active:
        return None
    say = say_on_stderr if world.local_rank == 0 else lambda _: None
    mine = on_every_rank(lambda: choose(config.foresight.kernel, device.type, say=say))
    everyone = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return ", ".join(sorted(set(everyone)))  # nodes may differ under `auto`


def on_every_rank(build: Callable[[], T]) -> T:
    """Collective: `build()`.  What the user must mend on any rank (a file that one node has not) is raised on every
    rank, because only rank 0 speaks."""
    result, mine = None, None
    try:
        result = build()
    except UserError as error:
        mine = str(error)
    problems: list[str | None] = [mine] * dist.get_world_size()
    dist.all_gather_object(problems, mine)
    problem = next((problem for problem in problems if problem is not None), None)
    if problem is not None:
        raise UserError(problem)
    return cast(T, result)


def open_run_folder(
    config: RunConfig,
    run: Path,
    world: World,
    resume: str | None,
    set_aside: Callable[[Path], None] | None,
    facts: dict[str, Any] | None = None,
) -> str | None:
    """Collective: the main rank makes the folder and writes what explains the run, with `facts` about this start;
    returns the resume request to obey (`store.check_run_folder` says what is refused)."""
    outcome: list[str | None] = [None, resume]
    if world.rank == 0:
        try:
            store.check_run_folder(run, resume, fresh=set_aside is not None)
            if resume == "if-present" and not (run / "checkpoints").is_dir():
                outcome[1] = None
            if set_aside is not None and resume is None:
                set_aside(run)
            _write_run_folder(config, run, world.size, facts or {})
        except (UserError, OSError) as error:
            outcome[0] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise UserError(outcome[0])
    return outcome[1]


def _write_run_folder(config: RunConfig, run: Path, world_size: int, facts: dict[str, Any]) -> None:
    ds_config = resolve(config, world_size)
    try:
        run.mkdir(parents=True, exist_ok=True)
        path, text = run / "config.yaml", dump(config)
        if path.exists() and path.read_text(encoding="utf-8") != text:  # a resume with other settings keeps both
            path.rename(run / f"config.before-{int(time.time())}.yaml")
        path.write_text(text, encoding="utf-8")
        (run / "deepspeed.json").write_text(json.dumps(ds_config, indent=2) + "\n", encoding="utf-8")
        environment = {**describe(world_size), **facts}
        (run / "environment.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")
        with (run / "starts.jsonl").open("a", encoding="utf-8") as file:  # one line a start, resumes included
            file.write(json.dumps({"unix_time": int(time.time()), **environment}) + "\n")
    except OSError as error:
        raise UserError(f"{run}: cannot be written ({error})") from None


def read_run_config(run: Path) -> RunConfig:
    """The resolved configuration stored with a run."""
    from mirai_ds.config import build

    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run}: not a run folder (it has no config.yaml)")
    return build(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
