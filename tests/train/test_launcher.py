"""Which launcher is recognised: every launcher, beside variables that were left over, and ranks asked for."""

from __future__ import annotations

import os

import pytest
import torch

from mirai_ds.config import UserError
from mirai_ds.runtime.distributed import export_world, local_device, rendezvous
from mirai_ds.runtime.launcher import Recognised, World, check_asked, recognise

Env = dict[str, str]


def ompi(rank: int, size: int, local: int, here: int) -> Env:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    return {f"OMPI_COMM_WORLD_{n}": str(v) for n, v in zip(names, (rank, size, local, here), strict=True)}


def step(rank: int, tasks: int, local: int, here: str, number: str = "0") -> Env:
    return {"SLURM_JOB_ID": "11", "SLURM_STEP_ID": number, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local),
            "SLURM_NTASKS": str(tasks), "SLURM_STEP_TASKS_PER_NODE": here}  # fmt: skip


TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
DEEPSPEED = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_SIZE": "2", "CROSS_RANK": "1"}
OWN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "MIRAI_DS_PARENT": "5 77"}
SCRIPT = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
INTERACTIVE = {**step(0, 1, 0, "1", "4294967290"), "SLURM_NNODES": "1"}  # salloc, on Slurm 22.05
SALLOC = {k: v for k, v in INTERACTIVE.items() if k != "SLURM_NTASKS"}
PTY = {**step(0, 1, 0, "1"), "SLURM_PTY_PORT": "4000"}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
FOURTH = World(3, 1, 4, 2)

# What started the process, and what is recognised of it.
LAUNCHERS: dict[str, tuple[Env, str, World | None]] = {
    "nobody": ({}, "none", None),
    "torchrun": (TORCHRUN, "torchrun", FOURTH),
    "torchrun, one rank": ({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
                           "torchrun", World(0, 0, 1, 1)),
    "deepspeed": (DEEPSPEED, "deepspeed", FOURTH),
    "mirai-ds": (OWN, "mirai-ds", FOURTH),
    "a script": (SCRIPT, "RANK and WORLD_SIZE", FOURTH),
    "srun": (step(3, 4, 1, "2(x2)"), "srun", FOURTH),
    "srun, uneven": (step(0, 3, 0, "2,1"), "srun", World(0, 0, 3, 2)),
    "srun, one task": (step(0, 1, 0, "1"), "srun", None),  # as many ranks as there are devices are started here
    "salloc": (SALLOC, "none", None),
    "salloc, tasks": ({**INTERACTIVE, "SLURM_NTASKS": "2"}, "none", None),
    "srun --pty": (PTY, "none", None),
    "srun --pty, tasks": ({**PTY, "SLURM_NTASKS": "2"}, "none", None),
    "sbatch": ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "none", None),
    "mpirun": (ompi(3, 4, 1, 2), "mpirun (Open MPI)", FOURTH),
    "mpirun, one": (ompi(0, 1, 0, 1), "mpirun (Open MPI)", None),
    "mpirun in a job": ({**ompi(3, 4, 1, 2), **step(1, 2, 0, "1(x2)")}, "mpirun (Open MPI)", FOURTH),
    "MVAPICH": ({"MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_LOCAL_RANK": "1",
                 "MV2_COMM_WORLD_LOCAL_SIZE": "2"}, "mpirun (MVAPICH)", FOURTH),
    "Hydra": (HYDRA, "mpirun (Hydra)", FOURTH),
    "srun --mpi=pmi2": ({**step(3, 4, 1, "2(x2)"), **HYDRA}, "mpirun (Hydra)", FOURTH),
    "torchrun in a job": ({**step(1, 2, 0, "1(x2)"), **TORCHRUN}, "torchrun", FOURTH),
    "deepspeed in a shell of salloc": ({**SALLOC, **DEEPSPEED}, "deepspeed", FOURTH),
    "srun, and a script that sets RANK": ({**step(3, 4, 1, "2(x2)"), **SCRIPT}, "RANK and WORLD_SIZE", FOURTH),
}  # fmt: skip
LEFT_OVER: dict[str, Env] = {
    "RANK": {"RANK": "0"}, "WORLD_SIZE": {"WORLD_SIZE": "2"}, "RANK and WORLD_SIZE": {"RANK": "0", "WORLD_SIZE": "1"},
    "LOCAL_RANK": {"LOCAL_RANK": "1"}, "MASTER_ADDR": {"MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"},
    "job": {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "n[1-2]"},
}  # fmt: skip
SETS_RANK = {"torchrun", "torchrun, one rank", "deepspeed", "mirai-ds", "a script", "torchrun in a job",
             "deepspeed in a shell of salloc", "srun, and a script that sets RANK"}  # fmt: skip


def test_each_launcher_is_recognised() -> None:
    for name, (env, launcher, world) in LAUNCHERS.items():
        assert recognise(env) == Recognised(launcher, world), name


def test_what_was_left_over_makes_no_other_world() -> None:
    """23 launchers x 6 variables left in the environment: the same world, or a refusal that names both sides."""
    for name, (env, _, world) in LAUNCHERS.items():
        for left, extra in LEFT_OVER.items():
            given = {**extra, **env}
            if left == "RANK and WORLD_SIZE" and world is not None and name not in SETS_RANK:
                with pytest.raises(UserError, match=r"contradicts itself: .* rank 0 of 1, .* rank \d of \d"):
                    recognise(given)
                continue
            found = recognise(given)
            assert found.world == world, (name, left, found)
            if left in ("RANK", "WORLD_SIZE") and name not in SETS_RANK:
                assert found.notes == (f"{left} is set without the other of RANK and WORLD_SIZE: ignored",)


def test_ranks_that_are_asked_for_are_those_there_are() -> None:
    for name, (env, _, world) in LAUNCHERS.items():
        found = recognise(env)
        check_asked(None, found)
        for asked in (1, 2, 4):
            if world is None or asked == world.size:
                check_asked(asked, found)  # nobody: as many are started
            else:
                with pytest.raises(UserError, match=f"--ranks {asked}: .* of {world.size} already"):
                    check_asked(asked, found)
        assert (world is None) == (found.world is None), name


@pytest.mark.parametrize(("env", "said"), [
    ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK = 'x' is no number"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, r"rank 2 of 2 ranks is none of 0\.\.1"),
    ({**step(0, 2, 0, "2"), "SLURM_NTASKS": "two"}, "SLURM_NTASKS = 'two'"),
    (ompi(4, 4, 0, 1), "rank 4 of 4"),
])  # fmt: skip
def test_numbers_that_are_none(env: Env, said: str) -> None:
    with pytest.raises(UserError, match=said):
        recognise(env)


def test_where_ranks_of_mpirun_meet() -> None:
    assert rendezvous(World(1, 1, 2, 2), ompi(1, 2, 1, 2)) == ("127.0.0.1", 29500)
    with pytest.raises(UserError, match="mpirun -x MASTER_ADDR=HOST"):
        rendezvous(World(1, 0, 2, 1), ompi(1, 2, 0, 1))


def test_a_rank_alone_takes_any_free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    monkeypatch.setenv("MASTER_PORT", "29500")
    export_world(World(0, 0, 1, 1))
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert os.environ["MASTER_PORT"] != "29500"


def test_a_number_of_threads_that_was_given_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that others use too, all cores are six times as slow as the one that is free."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        local_device(World(0, 0, 1, 1))
        assert torch.get_num_threads() == 3
        monkeypatch.delenv("OMP_NUM_THREADS")
        local_device(World(0, 0, 4096, 4096))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
