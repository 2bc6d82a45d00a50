"""What all ranks must agree upon before they train."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from mirai_ds.config import RunConfig, UserError
from mirai_ds.config.deepspeed_file import read
from mirai_ds.config.errors import shown
from mirai_ds.foresight import method_of
from mirai_ds.kernels.build import say_on_stderr
from mirai_ds.kernels.foresight_cosine import choose
from mirai_ds.runs.records import flatten
from mirai_ds.runtime.distributed import World

T = TypeVar("T")


# What torch, cuBLAS, NCCL and DeepSpeed read from the environment and compute differently for.
NUMERICS = (
    "DS_ACCELERATOR", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_BLAS_PREFER_CUBLASLT",
    "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_PROTO", "TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE",
    "MKL_CBWR", "ATEN_CPU_CAPABILITY",
)  # fmt: skip


@dataclass(frozen=True)
class RankStart:
    """What one rank was started with.  given: dotted names and values; deepspeed: its DeepSpeed file as read."""

    rank: int
    host: str
    given: dict[str, Any]
    deepspeed: dict[str, Any]


def agree_on_start(config: RunConfig, world: World, options: dict[str, Any]) -> None:
    """Collective, first: all ranks were started alike, and all go on with the DeepSpeed file that rank 0 has read.

    Compared are the configuration, the content of the DeepSpeed file, `options` by name, and the environment that
    changes numbers.  Raises UserError on every rank that names the rank, the field and both values: ranks with other
    settings train together without a word, and what comes out belongs to neither.
    """
    resolved = config.model_dump(mode="json")
    source = resolved.pop("deepspeed")
    file = on_every_rank(lambda: read(config.deepspeed))  # a node may lack it: nobody waits for that rank
    given = {
        **flatten(resolved), **flatten({"deepspeed": file}), **options,
        **{f"environment variable {name}": os.environ[name] for name in NUMERICS if name in os.environ},
    }  # fmt: skip
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, RankStart(world.rank, socket.gethostname(), given, file))
    first: RankStart = everyone[0]
    for other in everyone[1:]:
        for field in sorted(first.given.keys() | other.given.keys()):
            theirs, ours = (shown(rank.given[field]) if field in rank.given else "none" for rank in (other, first))
            if theirs != ours:
                raise UserError(
                    f"rank {other.rank} on {other.host} was started with another {field} than rank 0 on {first.host}: "
                    f"{theirs}, not {ours}; start all ranks with the same recipe, files and options"
                    + (f" (DeepSpeed file {shown(source)})" if field.startswith("deepspeed.") else "")
                )
    config.use_deepspeed_file(first.deepspeed)


def agree_on_kernel(config: RunConfig, device: torch.device, world: World) -> str | None:
    """Collective: what computes the cosines (`cpu`, `cuda`, `reference`), compiled if need be; None without any.
    One rank a node speaks.  Raises on every rank what went wrong on any."""
    method = method_of(config.foresight)
    if method is None or not method.cosine:
        return None
    say = say_on_stderr if world.local_rank == 0 else lambda _: None
    mine = on_every_rank(lambda: choose(config.foresight.kernel, device.type, say=say))
    everyone = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return ", ".join(sorted(set(everyone)))  # nodes may differ under `auto`


def on_every_rank(build: Callable[[], T]) -> T:
    """Collective: `build()`.  What the user must mend on any rank (a file that one node has not) is raised on every
    rank, because only rank 0 speaks."""
    result, mine = None, None
    try:
        result = build()
    except UserError as error:
        mine = str(error)
    problems: list[str | None] = [mine] * dist.get_world_size()
    dist.all_gather_object(problems, mine)
    problem = next((problem for problem in problems if problem is not None), None)
    if problem is not None:
        raise UserError(problem)
    return cast(T, result)
