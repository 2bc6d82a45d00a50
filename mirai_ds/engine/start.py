"""Before any engine: the version that computes right gradients, quiet logs, the process group."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import warnings
from datetime import timedelta

import torch

from mirai_ds.config import UserError
from mirai_ds.engine.gloo import take_over_gathers
from mirai_ds.runtime.distributed import World, export_world
from mirai_ds.runtime.interfaces import choose_gloo_interface

MINIMUM_DEEPSPEED = (0, 19, 8)


def log_level() -> str:
    """Level of DeepSpeed's own log: MIRAI_DS_DEEPSPEED_LOG, or ERROR."""
    return os.environ.get("MIRAI_DS_DEEPSPEED_LOG", "ERROR").upper()


def quiet() -> bool:
    """Whether DeepSpeed is to keep its reports to itself."""
    return log_level() in ("ERROR", "CRITICAL")


def check_version(version: str) -> None:
    """Refuse releases with wrong gradients under accumulation (seen in 0.18.2 to 0.19.5, ZeRO-1 and 2)."""
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if numbers < MINIMUM_DEEPSPEED:
        wanted = ".".join(map(str, MINIMUM_DEEPSPEED))
        raise UserError(
            f"deepspeed {version}: computes wrong accumulated gradients on ZeRO-1 and 2 (up to 96 % off while "
            f"the loss falls); install deepspeed>={wanted}"
        )


def start_process_group(world: World, timeout_minutes: float) -> None:
    """Join the process group: NCCL where there are GPUs, gloo otherwise.  Does nothing when it is there already."""
    import deepspeed
    import deepspeed.ops
    import torch.distributed as dist

    check_version(deepspeed.__version__)
    leave_muon_uncompiled()
    from deepspeed.utils.logging import logger

    logger.setLevel(log_level())
    for handler in logger.handlers:
        handler.setLevel(logging.NOTSET)
    # A C++ build of minutes at the first CPU run, for collectives that gloo does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "gloo"
    if backend == "gloo":
        take_over_gathers()
    # Calls that torch renames are DeepSpeed's: nothing that a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if dist.is_initialized():
        return
    # DeepSpeed collects garbage for each report of memory, several times an engine, printed or not: a third of a second
    # each, were the objects of imported modules, which stay in any case, looked through.
    gc.freeze()
    export_world(world)
    if world.size > world.local_size:  # several nodes; the control group is gloo's on GPUs too
        choose_gloo_interface(os.environ["MASTER_ADDR"])
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timedelta(minutes=timeout_minutes)
    )


def leave_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon with its functions as they are written.  ZeRO imports it in any case, and compiling them
    brings in torch's whole compiler: a second of every start, for an optimizer that is never used here."""
    from deepspeed.runtime import compiler

    compile_, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compile_


def forget_earlier_engines() -> None:
    """Before another engine in this process.  DeepSpeed remembers for good that one engine used `torch_autocast`, and
    then sums a later bf16 engine's gradients in bf16, whatever its file says; and it keeps the groups of hpZ, which a
    later engine on stage 3 then uses unasked, or cannot make in another size (seen in 0.19.8)."""
    from deepspeed.runtime import torch_autocast
    from deepspeed.utils import groups

    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
