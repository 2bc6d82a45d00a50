"""A training session on random data: what benchmarks step through, built as `mirai-ds train` builds it."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mirai_ds.config import RunConfig, build
from mirai_ds.config.own import is_own
from mirai_ds.model import GPT
from mirai_ds.runs.lock import RunLock
from mirai_ds.runtime.distributed import World, wait_for_ranks
from mirai_ds.runtime.signals import StopRequests
from mirai_ds.train.build import build_session
from mirai_ds.train.session import Session


@contextmanager
def random_session(config: RunConfig, world: World, device: torch.device, steps: int) -> Iterator[Session]:
    """Collective: `config` on random codes, enough for `steps` steps.  The process group must exist.

    The configuration's data is replaced; a frozen teacher, and an encoder without a weights file, get random weights.
    The engine is destroyed at the end, the run's folder removed.
    """
    with shared_folder(world) as folder:
        config = on_random_data(config, folder, world, steps)
        mine = [RunLock.take(folder).mine if world.rank == 0 else None]
        dist.broadcast_object_list(mine, src=0)
        run_lock = RunLock(folder, mine[0], main=world.rank == 0)  # type: ignore[arg-type]
        session = build_session(config, folder, world, device, run_lock, StopRequests())
        run_lock.note_start(0, None)
        yield session
        run_lock.release("finished")
        session.checkpoints.saver.close()
        session.loader.close()
        session.engine.destroy()
        del session
        gc.collect()


@contextmanager
def shared_folder(world: World) -> Iterator[Path]:
    """A temporary folder that all ranks of one machine share; collective."""
    names: list[str] = [tempfile.mkdtemp() if world.rank == 0 else ""]
    dist.broadcast_object_list(names, src=0)
    try:
        yield Path(names[0])
    finally:
        if world.rank == 0:
            shutil.rmtree(names[0], ignore_errors=True)


def on_random_data(config: RunConfig, folder: Path, world: World, steps: int) -> RunConfig:
    """Collective: files of random data and weights in `folder`, and `config` with them in place of its own."""
    given = config.model_dump(mode="json")
    if config.foresight.teacher_weights is not None:
        given["foresight"]["teacher_weights"] = str(folder / "teacher.pt")
    encoder = config.foresight.encoder
    write_encoder = encoder is not None and encoder.weights is None and not is_own(encoder.name)
    if write_encoder:
        given["foresight"]["encoder"] |= {"weights": str(folder / "encoder.safetensors"), "pretrained": False}
    if world.rank == 0:
        _write_data(config, folder / "data.npz", steps)
        if write_encoder:
            _write_encoder(config, folder / "encoder.safetensors")
        if config.foresight.teacher_weights is not None:
            torch.save({"model": GPT(config.model).state_dict()}, folder / "teacher.pt")
    wait_for_ranks()
    return build(given | {
        "data": {"source": "npz", "path": str(folder / "data.npz"), "held_out_fraction": 0.0, "workers": 0},
        "eval": {"loss": {"at_end": False}, "classifier": {"enabled": False}}, "sampling": {"classes": 1},
    })  # fmt: skip


def _write_data(config: RunConfig, path: Path, steps: int) -> None:
    """Writes random codes, and pixels where the method has an encoder."""
    count = max(config.train.global_batch_size * (steps + 1), config.model.num_classes)
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "codes": generator.integers(0, config.model.vocab_size, (count, config.model.block_size)),
        "labels": np.arange(count) % config.model.num_classes,
    }
    if config.foresight.teacher == "encoder":
        side = 16 * config.model.grid
        arrays["images"] = np.zeros((count, side, side, 3), np.uint8)
    np.savez(path, **arrays)


def _write_encoder(config: RunConfig, path: Path) -> None:
    from safetensors.torch import save_file

    from mirai_ds.foresight.encoders import encoder_plan

    assert config.foresight.encoder is not None
    plan, _ = encoder_plan(config.foresight.encoder, config.model.grid)
    generator = torch.Generator().manual_seed(0)
    save_file({n: 0.02 * torch.randn(t.shape, generator=generator) for n, t in plan.state_dict().items()}, path)
