"""Which launcher started this process, and its place among the ranks: from all that the environment says, not from one
variable, since shells hand on variables that were meant for somebody else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mirai_ds.config.errors import UserError
from mirai_ds.runtime.processes import PARENT


@dataclass(frozen=True)
class World:
    """This process's place among its peers."""

    rank: int
    local_rank: int
    size: int
    local_size: int


@dataclass(frozen=True)
class Recognised:
    """What the environment says.  launcher: for people; world: None where nobody launched this process as one of
    several; notes: what was there and was not believed."""

    launcher: str
    world: World | None
    notes: tuple[str, ...] = ()


# Launchers that set RANK and WORLD_SIZE themselves, by a variable that only they set.
_SURE = {PARENT: "mirai-ds", "TORCHELASTIC_RUN_ID": "torchrun", "CROSS_SIZE": "deepspeed"}
# Rank, size, local rank and local size of each MPI: where several set variables, the more particular is first.
_MPI = {
    "mpirun (Open MPI)": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                          "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "mpirun (MVAPICH)": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK",
                         "MV2_COMM_WORLD_LOCAL_SIZE"),
    "mpirun (Hydra)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}  # fmt: skip
# Numbers that Slurm gives to steps that are no task of the user's: interactive shells, batch scripts, prologs.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


def recognise(environ: Mapping[str, str] | None = None) -> Recognised:
    """The launcher of this process.  Raises UserError where two say different things and neither can be told to be
    left over."""
    env = os.environ if environ is None else environ
    torch_like, notes = _torch_like(env)
    sure = next((name for variable, name in _SURE.items() if variable in env), None)
    if sure is not None and torch_like is not None:
        return Recognised(sure, torch_like, notes)
    starters = [*_mpi(env), *_slurm(env)]
    if torch_like is None:
        if not starters:
            return Recognised("none", None, notes)
        name, world = starters[0]  # under mpirun, Slurm's tasks are mpirun's daemons
        return Recognised(name, world if world.size > 1 else None, notes)
    if torch_like.size == 1 and not any(world.size > 1 for _, world in starters):
        # Left over, or a container's count of machines: in either case nobody has started one rank a device.
        return Recognised("none", None, ("RANK = 0 and WORLD_SIZE = 1 stand for this process alone",))
    for name, world in starters:
        if world.size > 1 and (world.rank, world.size) != (torch_like.rank, torch_like.size):
            raise UserError(
                f"the environment contradicts itself: RANK and WORLD_SIZE say rank {torch_like.rank} of "
                f"{torch_like.size}, {name} says rank {world.rank} of {world.size}; unset RANK and WORLD_SIZE, which "
                "may be left over, or set both for every rank"
            )
    return Recognised("RANK and WORLD_SIZE", torch_like, notes)


def check_asked(asked: int | None, found: Recognised) -> None:
    """Raises UserError where `--ranks` asks for another number than the launcher has started."""
    if asked is not None and found.world is not None and asked != found.world.size:
        raise UserError(
            f"--ranks {asked}: this process is rank {found.world.rank} of {found.world.size} already, says "
            f"{found.launcher}; leave --ranks out, or start the command outside of it (unset RANK WORLD_SIZE)"
        )


def _torch_like(env: Mapping[str, str]) -> tuple[World | None, tuple[str, ...]]:
    """By RANK and WORLD_SIZE, which torchrun, deepspeed and scripts of one's own set."""
    there = [name for name in ("RANK", "WORLD_SIZE") if env.get(name)]
    if len(there) < 2:
        return None, tuple(f"{name} is set without the other of RANK and WORLD_SIZE: ignored" for name in there)
    rank, size = (_number(env, name) for name in ("RANK", "WORLD_SIZE"))
    local = _number(env, "LOCAL_RANK", _number(env, "SLURM_LOCALID", 0))
    local_size = _number(env, "LOCAL_WORLD_SIZE", _number(env, "LOCAL_SIZE", 1))
    return _checked("RANK, WORLD_SIZE", World(rank, local, size, local_size)), ()


def _mpi(env: Mapping[str, str]) -> list[tuple[str, World]]:
    found = []
    for name, (rank, size, local_rank, local_size) in _MPI.items():
        if env.get(rank) and env.get(size):
            place, count = _number(env, rank), _number(env, size)
            local = _number(env, local_rank, place)
            found.append((name, _checked(rank, World(place, local, count, _number(env, local_size, count)))))
    return found


def _slurm(env: Mapping[str, str]) -> list[tuple[str, World]]:
    """A task of a job step.  The shells of salloc, `srun --pty` and batch scripts carry the variables too: there
    nobody has started this process as one of the tasks."""
    step = env.get("SLURM_STEP_ID", "")
    if not step.isdigit() or int(step) >= _FIRST_SPECIAL_STEP or "SLURM_PTY_PORT" in env or "SLURM_PROCID" not in env:
        return []
    size = _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))
    here = (env.get("SLURM_STEP_TASKS_PER_NODE") or str(size)).split(",")[0].split("(")[0]
    local_size = int(here) if here.isdigit() else 1
    world = World(_number(env, "SLURM_PROCID"), _number(env, "SLURM_LOCALID", 0), size, local_size)
    return [("srun", _checked("SLURM_PROCID", world))]


def _checked(name: str, world: World) -> World:
    if world.rank >= world.size:
        raise UserError(f"{name}: rank {world.rank} of {world.size} ranks is none of 0..{world.size - 1}; unset it")
    return world


def _number(env: Mapping[str, str], name: str, otherwise: int | None = None) -> int:
    value = env.get(name, "")
    if not value and otherwise is not None:
        return otherwise
    if not value.isdigit():
        raise UserError(f"environment variable {name} = {value!r} is no number; unset it, or start with a launcher")
    return int(value)
