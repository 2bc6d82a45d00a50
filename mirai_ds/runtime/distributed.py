"""Facts about this process among its peers, whoever started it: deepspeed, torchrun, srun, or nobody."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class World:
    """This process's place among its peers."""

    rank: int
    local_rank: int
    size: int
    local_size: int


def read_world(environ: dict[str, str] | None = None) -> World | None:
    """The place given by a launcher, or None when nobody launched us.

    deepspeed and torchrun set RANK, LOCAL_RANK, WORLD_SIZE.  Under a direct srun (and `deepspeed --launcher slurm`,
    which sets none of them) they come from SLURM_*.
    """
    env = dict(os.environ) if environ is None else environ
    if "RANK" in env and "WORLD_SIZE" in env:
        local_size = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or "1"
        return World(int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"]), int(local_size))
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", 1)) >= 1:
        tasks = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_NTASKS", "1")).split(",")[0].split("(")[0]
        return World(int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), int(env["SLURM_NTASKS"]), int(tasks))
    return None


def export_world(world: World) -> None:
    """Put the place into the variables that torch.distributed reads; the address must come from the launcher."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    os.environ.update(
        RANK=str(world.rank), LOCAL_RANK=str(world.local_rank), WORLD_SIZE=str(world.size),
        LOCAL_WORLD_SIZE=str(world.local_size), LOCAL_SIZE=str(world.local_size),
    )  # fmt: skip


def local_device(world: World) -> torch.device:
    """The GPU of this local rank, or the CPU where there is none; CPU ranks share the cores evenly."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // max(1, world.local_size)))
    return torch.device("cpu")
