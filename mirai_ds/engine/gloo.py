"""Gathers between processes on CPUs.  gloo's own all-gather is slow: between two ranks on two cores it took 0.56 s for
GPT-B's 444 MB, broadcasts of the same bytes 0.13 s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor


def gather_parts(parts: Sequence[Tensor], group: Any) -> None:
    """Collective: `parts[r]` becomes what rank r of `group` has there.  In place, of one size on every rank."""
    if len(parts) == 1:
        return
    group = group or dist.group.WORLD
    works = [
        dist.broadcast(part, dist.get_global_rank(group, rank), group=group, async_op=True)
        for rank, part in enumerate(parts)
    ]
    for work in works:
        assert work is not None
        work.wait()


def gather_dp_groups(groups_flat: Any, partitioned_param_groups: Any, dp_process_group: Any, **_: Any) -> None:
    """DeepSpeed's `all_gather_dp_groups`, for updated weights on stages 1 and 2."""
    for parts, group in zip(partitioned_param_groups, dp_process_group, strict=True):
        gather_parts(parts, group)


def take_over_gathers() -> None:
    """Let DeepSpeed's engines of this process gather weights in this way."""
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import stage_1_and_2

    bf16_optimizer.all_gather_dp_groups = stage_1_and_2.all_gather_dp_groups = gather_dp_groups
