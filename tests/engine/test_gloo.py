"""Gathers on CPUs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from mirai_ds.engine.gloo import gather_parts


def gather_case() -> list[list[float]]:
    """Every rank fills its own row; then the same in a group whose order is another."""
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = torch.full((world, 5), -1.0)
    whole[rank] = torch.arange(5.0) + 10 * rank
    gather_parts(whole.unbind(), None)
    group = dist.new_group([world - 1, 0])
    pair = torch.full((2, 1), -1.0)
    if rank in (0, world - 1):
        mine = dist.get_rank(group)
        pair[mine] = 100.0 + rank
        gather_parts(pair.unbind(), group)
    return [*whole.tolist(), pair.flatten().tolist()]


def test_every_rank_has_every_part(ranks: Any) -> None:
    rows = [[10.0 * rank + i for i in range(5)] for rank in range(2)]
    for found in ranks[2].run(gather_case):
        assert found[:2] == rows
        assert sorted(found[2]) == [100.0, 101.0]


def deepspeed_gathers_case() -> list[bool]:
    """Whether the engine's gather of updated weights is ours."""
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import stage_1_and_2

    from mirai_ds.engine import gloo

    return [m.all_gather_dp_groups is gloo.gather_dp_groups for m in (bf16_optimizer, stage_1_and_2)]


def test_deepspeed_uses_it(ranks: Any) -> None:
    assert ranks[2].run(deepspeed_gathers_case) == [[True, True]] * 2
