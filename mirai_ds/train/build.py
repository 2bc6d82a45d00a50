"""From a configuration to a `Session`: data, teacher, objective, engine, in the order in which they need each other."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mirai_ds.checkpoint.gpt_file import PROJECTORS, read_gpt_file
from mirai_ds.checkpoint.llamagen import check_gpt_weights, check_heads, check_told
from mirai_ds.checkpoint.model_folder import weights_file
from mirai_ds.checkpoint.saver import Saver
from mirai_ds.checkpoint.weights import checkpoint_of, checkpoint_weights
from mirai_ds.config import ConfigError, DataConfig, RunConfig, UserError
from mirai_ds.config.deepspeed_file import resolve
from mirai_ds.data import BatchLoader, DataOrder, Dataset, load_dataset
from mirai_ds.data.loader import auto_workers, warm_page_cache
from mirai_ds.engine.compiled import compile_blocks
from mirai_ds.engine.engine import TrainEngine
from mirai_ds.engine.step_graphs import StepGraphs, enter_capturable_stream
from mirai_ds.foresight import MiraiObjective, Teacher, seam_notes
from mirai_ds.model import initialise
from mirai_ds.runs.lock import RunLock
from mirai_ds.runtime.control import Control
from mirai_ds.runtime.distributed import World, repeatable_cublas
from mirai_ds.runtime.log import LOG
from mirai_ds.runtime.signals import StopRequests
from mirai_ds.train.agree import on_every_rank
from mirai_ds.train.checkpoints import Checkpoints, Origin
from mirai_ds.train.session import Session
from mirai_ds.train.teacher import build_teacher

MAX_SCORED_SIDE = 64  # the judge is a support vector machine on pixels


def build_session(
    config: RunConfig, run: Path, world: World, device: torch.device, run_lock: RunLock, stop: StopRequests,
    resuming: bool = False, data: DataConfig | None = None,
) -> Session:  # fmt: skip
    """Build data, objective, teacher and engine.  The process group must exist.  Raises UserError.

    resuming: a checkpoint will be loaded, so `train.init_from` is not read, and need not exist any more.  data: the
    configuration's section with this node's copies of its stores, to read from; None: the stores themselves.
    """
    seed_everything(config.seed)
    if config.train.deterministic:
        _be_deterministic()
    ds_config = resolve(config, world.size, cpu=device.type == "cpu")
    dataset = on_every_rank(lambda: load_dataset(data or config.data, config.model, str(device)))
    order = DataOrder(len(dataset.train), config.train.global_batch_size, config.seed)
    if order.steps_per_epoch == 0:
        raise UserError(
            f"train.global_batch_size = {order.global_batch_size}: the training set has only {order.num_samples} images"
        )
    check_score(config, dataset)
    if world.local_rank == 0:
        warm_page_cache(dataset.train)
    teacher, teacher_digest, notes = on_every_rank(lambda: build_teacher(config, device))
    objective = MiraiObjective(
        config.model, config.foresight, teacher.feature_dim if teacher else None,
        ds_config["gradient_accumulation_steps"],
    )  # fmt: skip
    initialise(objective, config.seed, config.model.init_std)
    if device.type == "cuda" and config.train.cuda_graph == "auto":
        enter_capturable_stream(device)
    heads = objective.projectors.state_dict(prefix=PROJECTORS)
    begins = config.train.init_from is not None and not resuming
    given = on_every_rank(lambda: initial_weights(config, heads)) if begins else None
    engine = TrainEngine(objective, config, ds_config, device)
    if engine.compiled and teacher is not None:
        compile_blocks(teacher.blocks)
    if given is not None:
        engine.load_weights(given)
    loader = _loader(config, dataset, order, ds_config["train_micro_batch_size_per_gpu"], world, device, teacher)
    control = Control(config.launch.timeout_minutes)
    saver = Saver(run, world.rank, run_lock, control, config.checkpoint)
    origin = Origin(dataset.train.digest(), teacher_digest)
    checkpoints = Checkpoints(config, saver, control, run_lock, engine, world, origin)
    stop.is_saving = lambda: saver.in_flight >= 0
    stop.unsaved_steps = lambda: checkpoints.progress.step - max(checkpoints.saved_step, 0)
    if not len(dataset.held_out) and (config.eval.loss.at_end or config.eval.loss.every_steps):
        notes.append("no held-out samples, no held-out loss: give data.held_out_path or held_out_fraction")
    for note in [*notes, *seam_notes(config.foresight, config.model)]:
        LOG.info("%s", note)
    graphs = StepGraphs(engine, teacher, control)
    if device.type == "cuda":
        LOG.info(
            "steps: blocks %scompiled, %s", "" if engine.compiled else "not ",
            f"run plainly, since {graphs.problem}" if graphs.problem else "captured as CUDA graphs",
        )  # fmt: skip
    return Session(
        config, run, world, device, dataset, loader, engine, teacher, control, stop, run_lock, checkpoints,
        graphs,
    )  # fmt: skip


def _loader(
    config: RunConfig, dataset: Dataset, order: DataOrder, micro_batch: int, world: World, device: torch.device,
    teacher: Teacher | None,
) -> BatchLoader:  # fmt: skip
    """This rank's batches, with pixels where the teacher reads them."""
    watches = teacher is not None and teacher.reads_images
    return BatchLoader(
        dataset.train, order, micro_batch, world.rank, world.size, device, watches, prefetch=config.data.prefetch,
        workers=auto_workers(watches, world.local_size) if config.data.workers is None else config.data.workers,
    )  # fmt: skip


def _be_deterministic() -> None:
    repeatable_cublas()
    # Not `warn_only`: torch would then go on choosing attention whose backward pass adds in any order.
    torch.use_deterministic_algorithms(True)
    # Else torch fills every buffer that it hands out: a fifth of GPT-B's step on a CPU, most of it in DeepSpeed.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


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


def initial_weights(config: RunConfig, heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`train.init_from`: the raw weights of a file, the average where it has no other, or of a run folder's newest
    whole checkpoint.  heads: the run's own, by `projectors.*` key, for their shapes.  Raises UserError."""
    path = weights_file(Path(config.train.init_from or ""))
    if path.is_dir():
        folder, step, theirs = checkpoint_of(path, None)
        weights, told = checkpoint_weights(folder, "raw", heads=True), theirs.model.model_dump()
        what = f"raw weights of step {step}"
    else:
        file = read_gpt_file(path, or_other=True)
        weights, told, what = file.weights, file.model, f"{file.kind} weights"
    check_told(told, config.model, path, ["n_head"])
    check_gpt_weights(weights, config.model, path)
    if heads:
        check_heads(weights, heads, path)
    given = any(key.startswith(PROJECTORS) for key in weights)
    if given or heads:
        what += f", alignment heads {'too' if given and heads else 'anew' if heads else 'left out'}"
    LOG.info("train.init_from: %s, %s; the average begins as a copy", path, what)
    return weights
