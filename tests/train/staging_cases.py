"""Runs inside ranks: stores copied to the disks of several nodes, of which each rank may be one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mirai_ds.config import UserError
from mirai_ds.config.load import build
from mirai_ds.data import load_dataset, staging
from mirai_ds.runtime.distributed import World
from mirai_ds.train.staging import stage_data


def staging_case(store: str, disks: list[str], nodes: int, minutes: float = 5, slow: bool = False) -> dict[str, Any]:
    """What a rank is told when each rank's $NODE_DISK is its of `disks`: the copies' folder, the data's digest with it
    and without, and whether this rank copied; or the mistake."""
    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ["NODE_DISK"] = disks[rank]
    local = size // nodes
    config = build({
        "data": {"source": "store", "path": store, "stage": "$NODE_DISK"}, "launch": {"timeout_minutes": minutes},
        "eval": {"classifier": {"enabled": False}}, "foresight": {"method": "none"},
        "model": {"size": "custom", "dim": 8, "n_layer": 1, "n_head": 1, "vocab_size": 64, "num_classes": 2,
                  "block_size": 16},
    })  # fmt: skip
    copied, beats = [], []
    original = staging._copy_file

    def noted(source: Path, *others: Any) -> int:
        copied.append(source.name)
        if slow and rank == size - 1:
            time.sleep(3600)
        return original(source, *others)

    staging._copy_file = noted
    try:
        data = stage_data(config, World(rank, rank % local, size, local), beats.append)
    except UserError as error:
        return {"mistake": str(error)}
    finally:
        staging._copy_file = original
    digests = [load_dataset(one, config.model).train.digest() for one in (data, config.data)]
    return {"path": data.path, "digests": digests, "copied": copied, "beats": set(beats)}
