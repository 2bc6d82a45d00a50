"""Facts about this process among its peers, whoever started it: deepspeed, torchrun, srun, mpirun, or nobody."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping

import torch
import torch.distributed as dist

from mirai_ds.config.errors import UserError
from mirai_ds.runtime.launch import free_port, visible_gpus
from mirai_ds.runtime.launcher import World, recognise

__all__ = ["World"]


def read_world(environ: Mapping[str, str] | None = None) -> World | None:
    """The place given by a launcher (`launcher.recognise`), or None when nobody launched us as one of several."""
    return recognise(environ).world


def export_world(world: World) -> None:
    """Put this process's place into the variables that torch.distributed and DeepSpeed read.

    The address of rank 0 is the launcher's, if it gave one.  A direct srun gives none: then it is the first node of
    the job step, at a port that follows from the job's number.  LOCAL_RANK becomes the index of this process's GPU,
    which is how DeepSpeed uses it: 0 where each process sees one GPU only.  Raises UserError for several nodes of
    unknown names.
    """
    address, port = rendezvous(world)
    if world.size == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:  # nobody has to find it: any free port will do
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    os.environ.setdefault("MASTER_ADDR", address)
    os.environ.setdefault("MASTER_PORT", str(port))
    index = device_index(world, torch.cuda.device_count()) if use_cuda() else world.local_rank
    os.environ.update(
        RANK=str(world.rank), LOCAL_RANK=str(index), WORLD_SIZE=str(world.size),
        LOCAL_WORLD_SIZE=str(world.local_size), LOCAL_SIZE=str(world.local_size),
    )  # fmt: skip


def rendezvous(world: World, environ: Mapping[str, str] | None = None) -> tuple[str, int]:
    """Address and port at which the ranks meet when the launcher names none.

    Raises UserError when the ranks are on several nodes and nothing says which is the first.
    """
    env = os.environ if environ is None else environ
    if "SLURM_STEP_ID" not in env:
        # RANK without LOCAL_WORLD_SIZE may be a script's on one machine; mpirun always says how many there are.
        if world.size > world.local_size and not {"MASTER_ADDR", "RANK"} & env.keys():
            raise UserError(
                f"{world.size} ranks on several machines, and MASTER_ADDR does not say where rank 0 is; give all of "
                "them its address and a free port there, e.g. mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500"
            )
        return "127.0.0.1", 29500
    number = int(env.get("SLURM_JOB_ID", "0")) * 31 + int(env["SLURM_STEP_ID"])
    port = 15000 + number % 15000  # below what kernels hand out to clients; jobs that share a node differ
    if world.size == world.local_size and int(env.get("SLURM_STEP_NUM_NODES", "1")) == 1:
        return "127.0.0.1", port
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    if not nodes and "MASTER_ADDR" not in env:
        raise UserError(
            f"{world.size} ranks on several nodes, and neither MASTER_ADDR nor SLURM_STEP_NODELIST says where rank 0 "
            'is; export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"'
        )
    return first_host(nodes), port


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `gpu[03-07,9],login1` -> `gpu03`, `rack[1-2]-n[5-6]` -> `rack1-n5`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0] if first else nodes)


def use_cuda() -> bool:
    """Whether ranks of this process's kind run on GPUs."""
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def device_index(world: World, visible: int) -> int:
    """Which of this process's `visible` GPUs is this rank's.

    Launchers either show all GPUs of a node to each of its ranks, or one to each (`srun --gpus-per-task=1`).  Raises
    UserError when there are fewer than ranks on this node.
    """
    if visible == 1:
        return 0
    if world.local_rank >= visible:
        raise UserError(
            f"rank {world.rank} is number {world.local_rank} on its node and sees {visible} GPUs; start at most "
            f"{visible} ranks a node, or show more GPUs to each (CUDA_VISIBLE_DEVICES, --gpus-per-node)"
        )
    return world.local_rank


def local_device(world: World) -> torch.device:
    """The GPU of this local rank, or the CPU where there is none; CPU ranks share the cores evenly, unless
    OMP_NUM_THREADS says how many each may use.

    Raises UserError where there are GPUs that torch cannot use, or fewer than ranks: training on the CPU instead would
    take weeks for what was meant to take hours.  DS_ACCELERATOR=cpu asks for the CPU.
    """
    if use_cuda():
        repeatable_cublas()
        device = torch.device("cuda", device_index(world, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        return device
    if gpus := visible_gpus():
        which = f"{gpus} GPUs here, but torch {torch.__version__} cannot use them"
        raise UserError(f"{which}: {unusable_because()}; to train on the CPU set DS_ACCELERATOR=cpu")
    if "OMP_NUM_THREADS" not in os.environ:  # else its user has decided, on a shared machine for good reasons
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // max(1, world.local_size)))
    return torch.device("cpu")


def repeatable_cublas() -> None:
    """Ask cuBLAS for workspaces that make its sums repeatable.  It counts if set before the first matrix product:
    older releases of torch (2.8) look once, and then refuse to train deterministically."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def wait_for_ranks() -> None:
    """Collective: a barrier of the default group.  NCCL is told the device, which it would else guess aloud."""
    dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def leave_process_group() -> None:
    """Collective, last: wait for all ranks and leave the default group; torch warns of groups that nobody left."""
    wait_for_ranks()
    dist.destroy_process_group()


def unusable_because() -> str:
    """Why torch can use none of this machine's GPUs, in a line."""
    if torch.version.cuda is None:
        return "it is a build without CUDA; install one with it"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.zeros(1, device="cuda")
        except (RuntimeError, AssertionError) as error:
            said = [str(warning.message) for warning in caught] or [str(error)]
            return said[0].strip().splitlines()[0].removesuffix(".")
    return "torch.cuda.is_available() is false"
