"""What ranks run: a few steps of a real session, a checkpoint, and its continuation on any other layout."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mirai_ds.config import load
from mirai_ds.config.deepspeed_file import read
from mirai_ds.runs.lock import RunLock
from mirai_ds.runtime.distributed import World
from mirai_ds.runtime.signals import StopRequests
from mirai_ds.train.build import build_session
from mirai_ds.train.nonfinite import confirm_step
from mirai_ds.train.session import Session
from mirai_ds.train.step import mean_over_ranks, train_step

SAVED, STEPS = 4, 2
SETTINGS = [
    "model.dim=32", "model.n_layer=3", "model.n_head=2", "train.epochs=3", "train.global_batch_size=16",
    "foresight.warmup_epochs=0.025", "foresight.heads_in_warmup=sleep", "foresight.projector_dim=32",
    "foresight.kernel=reference",
    "eval.classifier.enabled=false", "ema.decay=0.9", "model.token_dropout=0.05", "model.resid_dropout=0.1",
    "model.ffn_dropout=0.1", "optimizer.lr=2e-3",
]  # fmt: skip


def _session(run: Path, stage: int, precision: str, zero: dict[str, Any] | None = None) -> Session:
    rank, world = dist.get_rank(), dist.get_world_size()
    settings = [*SETTINGS, f"train.precision={precision}"]
    config = load("digits-mirai-e", settings, f"zero{stage}")
    if zero:
        file = read(f"zero{stage}")
        config.deepspeed = {**file, "zero_optimization": file["zero_optimization"] | zero}
    mine = [RunLock.take(run).mine if rank == 0 else None]
    dist.broadcast_object_list(mine, src=0)
    run_lock = RunLock(run, mine[0], main=rank == 0)  # type: ignore[arg-type]
    return build_session(config, run, World(rank, rank, world, world), torch.device("cpu"), run_lock, StopRequests())


def _advance(session: Session, steps: int) -> tuple[list[float], list[list[int]]]:
    """Global losses, and the samples of each step in the order of the global batch."""
    losses, samples = [], []
    for _ in range(steps):
        cut = session.loader.cut
        mine = []
        for a in range(cut.accumulation):
            start = (a * cut.world + cut.rank) * cut.micro
            mine.append((start, cut.order.batch(session.step, start, start + cut.micro)[0].tolist()))
        everyone = sorted(part for parts in session.control.gather(mine) for part in parts)
        samples.append([index for _, part in everyone for index in part])
        record = train_step(session, session.step)
        session.count_step()
        record = confirm_step(session, record)
        losses.append(mean_over_ranks(record.metrics)["loss"][0])
    return losses, samples


def _release(session: Session) -> None:
    session.run_lock.release("finished")
    session.engine.destroy()
    del session
    gc.collect()
    dist.barrier()


def save_case(folder: str, stage: int, precision: str) -> dict[str, Any]:
    """SAVED steps (heads asleep in the first ones), a checkpoint, and STEPS more."""
    run = Path(folder)
    session = _session(run, stage, precision)
    session.run_lock.note_start(0, None)
    _advance(session, SAVED)
    session.save_checkpoint()
    losses, samples = _advance(session, STEPS)
    _release(session)
    return {"losses": losses, "samples": samples}


def resume_case(
    folder: str, target: str, stage: int, precision: str, zero: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A copy of the run, resumed on this pool's world, this stage and these of DeepSpeed's settings for it."""
    run = Path(target)
    if dist.get_rank() == 0:
        shutil.copytree(folder, run)
    dist.barrier()
    session = _session(run, stage, precision, zero)
    session.checkpoints.resume("auto")
    assert session.step == SAVED
    state = {
        f"{kind}/{name}": value.double().sum().item()
        for kind in ("raw", "ema")
        for name, value in session.engine.gather_weights(kind, prefix="").items()  # type: ignore[arg-type]
    }
    losses, samples = _advance(session, STEPS)
    session.save_checkpoint()
    _release(session)
    return {"losses": losses, "samples": samples, "state": state}
