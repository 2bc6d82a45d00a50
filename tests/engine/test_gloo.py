"""Gathers on CPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from mirai_ds.engine.gloo import gather_parts
from tests.engine.cases import fixed_target, release, toy_config, toy_engine, toy_loader
from tests.engine.wire import Wire


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


def collectives_case(stage: int, precision: str) -> list[str]:
    """Kinds of the large collectives of a step and of a teacher's refresh."""
    engine = toy_engine(config := toy_config("mirai-e", stage, precision))
    engine.set_rates(1e-3, heads_active=True)
    (micro,) = toy_loader(config, dist.get_rank(), dist.get_world_size(), 1).micro_batches(0)
    with Wire() as wire:
        loss, _ = engine.forward(micro.tokens, micro.labels, micro.keys, fixed_target(config, micro, 0), 1.0)
        engine.backward(loss)
        engine.step()
        engine.gather_weights("ema")
    release(engine)
    return sorted({kind for kind, _ in wire.bytes})


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16")])
def test_nothing_is_gathered_otherwise_on_cpus(ranks: Any, stage: int, precision: str) -> None:
    for kinds in ranks[2].run(collectives_case, stage, precision):
        assert "c10d::broadcast_" in kinds
        assert "all-gather" not in kinds
