"""Checkpoint cases that ranks run: save, build a new engine, load, continue."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mirai_ds.checkpoint.format import StateReader
from mirai_ds.checkpoint.saver import Saver
from mirai_ds.checkpoint.store import CheckpointInfo
from mirai_ds.config import CheckpointConfig
from mirai_ds.engine.engine import TrainEngine
from mirai_ds.engine.state import SnapshotBuffers, read_into, take_snapshot
from mirai_ds.runs.lock import RunLock
from mirai_ds.runtime.control import Control
from tests.engine.cases import fixed_target, release, toy_config, toy_engine, toy_loader


def advance(engine: TrainEngine, accumulation: int, first: int, steps: int) -> list[float]:
    """Global-batch losses of some steps."""
    loader = toy_loader(engine.config, dist.get_rank(), dist.get_world_size(), accumulation)
    losses = []
    for step in range(first, first + steps):
        engine.set_rates(3e-3, heads_active=True)
        total = torch.zeros((), dtype=torch.float64)
        for batch in loader.micro_batches(step):
            loss, _ = engine.forward(
                batch.tokens, batch.labels, batch.keys, fixed_target(engine.config, batch, step), 1.0
            )
            engine.backward(loss)
            engine.step()
            total += loss.detach().double() / accumulation
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
    return losses


def write_state(folder: Path, engine: TrainEngine, precision: str) -> None:
    """All ranks' slices and the manifest, as a run writes them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    info = CheckpointInfo(4, 16, 0, 0, world, engine.stage, precision, "mirai-e", "", 4)
    saver = Saver(folder.parent, rank, RunLock(folder.parent, None), Control(5), CheckpointConfig())  # type: ignore[arg-type]
    assert saver.save_aside(folder, info, lambda: take_snapshot(engine, rank, SnapshotBuffers())) == []


def write_case(folder: str, stage: int, precision: str, accumulation: int, recompute: dict[str, Any]) -> list[float]:
    """4 steps, save, 4 more: the losses after the save."""
    engine = toy_engine(toy_config("mirai-e", stage, precision, accumulation, recompute=recompute))
    advance(engine, accumulation, 0, 4)
    write_state(Path(folder), engine, precision)
    losses = advance(engine, accumulation, 4, 4)
    release(engine)
    return losses


def read_case(folder: str, stage: int, precision: str, accumulation: int, recompute: dict[str, Any]) -> dict[str, Any]:
    """A new engine of any layout from the folder: bitwise state, and the losses of the next 4 steps."""
    dist.barrier()
    engine = toy_engine(toy_config("mirai-e", stage, precision, accumulation, recompute=recompute, seed=77))
    reader = StateReader(Path(folder))
    read_into(engine, reader)
    wrong = []
    for kind, ours in (("master", "raw"), ("ema", "ema")):
        got = engine.gather_weights(ours, prefix="")
        wrong += [f"{kind}/{n}" for n, v in got.items() if not torch.equal(v, reader.read(kind, n).view(v.shape))]
    order = engine.config.model_copy(update={"seed": 0})
    engine.config = order  # the data order of the saved run
    losses = advance(engine, accumulation, 4, 4)
    release(engine)
    return {"wrong": wrong, "losses": losses}


def survivors_case(stage: int, precision: str, recompute: dict[str, Any]) -> list[str]:
    """What of a destroyed engine is still there after two steps and a collection of garbage."""
    engine = toy_engine(toy_config("mirai-e", stage, precision, 1, recompute=recompute))
    advance(engine, 1, 0, 2)
    parts = {"engine": engine, "deepspeed": engine.ds, "module": engine.ds.module, "optimizer": engine.ds.optimizer}
    parts |= dict(engine.ds.module.named_parameters())
    watched = {name: weakref.ref(part) for name, part in parts.items()}
    engine.destroy()
    del engine, parts
    gc.collect()
    return [name for name, reference in watched.items() if reference() is not None]
