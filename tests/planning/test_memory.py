"""The plan's memory against what real steps of the engine hold; 10 % is the promise of docs/looking-inside.md."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from mirai_ds.benchmarks.memory import RECOMPUTE, LiveStorages, case, compare, covering, described, variants
from mirai_ds.config import RunConfig
from tests.rank_pool import RankPool

PROMISE = 10.0  # percent
NONE, _, FULL = RECOMPUTE


def test_the_instrument_on_a_known_case() -> None:
    """Views and in-place operations add nothing; what is kept for backward stays until backward is done."""
    with LiveStorages() as counter:
        a = torch.empty(1000, 250, requires_grad=True)  # 1 MB
        assert (counter.live, counter.peak) == (1_000_000, 1_000_000)
        b = a.view(250, 1000).t()
        with torch.no_grad():
            a.add_(1)
        assert counter.live == 1_000_000
        c = a.exp()  # keeps its result
        d = (c * c).sum()  # keeps c, not the product
        peak = counter.peak
        assert counter.live == 2_000_004
        assert peak == 3_000_004
        del b, c
        assert counter.live == 2_000_004
        d.backward()  # then c is gone; the gradient is there
        del d
        gc.collect()
        assert counter.live == 2_000_000
        a.grad = None
        assert counter.restart() == 1_000_000
        torch.empty(500_000)
        assert (counter.live, counter.peak) == (1_000_000, 3_000_000)


def test_a_release_in_another_thread_is_seen() -> None:
    import threading

    held = []
    with LiveStorages() as counter:
        held.append(torch.empty(250_000))
        assert counter.live == 1_000_000
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
        assert counter.live == 0


def measured(config: RunConfig) -> dict[str, Any]:
    """On a rank of a pool."""
    import torch.distributed as dist

    from mirai_ds.runtime.distributed import World

    rank, world = dist.get_rank(), dist.get_world_size()
    return compare(config, World(rank, rank, world, world), torch.device("cpu"))


def check(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert abs(row["error_percent"]) <= PROMISE, row
        assert row["resting_planned_mb"] == pytest.approx(row["resting_measured_mb"], rel=0.03), row
        assert row["measured_mb"] > 1.1 * row["resting_measured_mb"]  # activations and gradients count


FAST = [
    case("none", "fp32", 2, NONE, 4, 1), case("mtp", "bf16-autocast", 2, NONE, 8, 1),
    case("mtp", "fp32", 2, FULL, 8, 1, par_tokens=16),
    case("mirai-e", "bf16-autocast", 3, NONE, 8, 1, head="transformer"),
]  # fmt: skip


@pytest.mark.parametrize("config", FAST, ids=described)
def test_within_ten_percent(ranks: dict[int, RankPool], config: RunConfig) -> None:
    check(ranks[1].run(measured, config))


@pytest.mark.parametrize(("world", "every"), [
    pytest.param(1, 9, marks=pytest.mark.exhaustive), pytest.param(2, 28, marks=pytest.mark.matrix),
])  # fmt: skip
def test_within_ten_percent_everywhere(ranks: dict[int, RankPool], world: int, every: int) -> None:
    for config in [*covering(world), *variants(world)][1::every]:  # all: mirai_ds.benchmarks.memory
        check(ranks[world].run(measured, config))
