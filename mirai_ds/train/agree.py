"""What all ranks must agree upon before they train."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from mirai_ds.config import RunConfig, UserError
from mirai_ds.kernels.build import say_on_stderr
from mirai_ds.kernels.foresight_cosine import choose
from mirai_ds.runtime.distributed import World

T = TypeVar("T")


def agree_on_kernel(config: RunConfig, device: torch.device, world: World) -> str | None:
    """Collective: what computes the cosines (`cpu`, `cuda`, `reference`), compiled if need be; None without any.
    One rank a node speaks.  Raises on every rank what went wrong on any."""
    if config.foresight.method in ("none", "mtp"):
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
