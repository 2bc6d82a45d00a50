"""The communication model against what DeepSpeed hands to torch.distributed, and every shipped DeepSpeed file.

Bytes are exact but for two things: parts are padded to a multiple of the ranks (here nothing: sizes divide), and on
stage 3 the step in which what is let go depends on where modules end, not on elements alone (bound there: one block's
worth, a quarter of this model).
"""

from __future__ import annotations

from typing import Any

import pytest

from mirai_ds.config.deepspeed_file import packaged_names, read
from tests.engine import wire
from tests.marks import rest_by_hand

EVERYWHERE = [n for n in packaged_names() if not read(n)["zero_optimization"].get("zero_quantized_weights")]


@pytest.mark.parametrize(("stage", "precision", "accumulation"), rest_by_hand(
    [(stage, precision, often) for often in (1, 2) for stage, precision in
     [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16-autocast"), (2, "bf16"), (3, "fp32"), (3, "bf16")]],
    {(0, "fp32", 2), (1, "fp32", 1), (1, "bf16", 2), (2, "bf16-autocast", 1), (2, "bf16", 2), (3, "fp32", 1),
     (3, "bf16", 2)},
))  # fmt: skip
def test_bytes_are_those_counted(ranks: Any, stage: int, precision: str, accumulation: int) -> None:
    for counted, predicted in ranks[2].run(wire.counted_case, stage, precision, accumulation, {}):
        assert counted == predicted


@pytest.mark.parametrize(
    ("stage", "accumulation", "zero"),
    [
        (1, 2, {"overlap_comm": True}),  # reduced once all the same
        (2, 2, {"use_multi_rank_bucket_allreduce": False}),
        (2, 1, {"overlap_comm": True, "round_robin_gradients": True}),
        (2, 1, {"allgather_bucket_size": 100}),  # DeepSpeed does not look at it
        (3, 2, {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}),  # nothing is kept
    ],
)
def test_switches_that_change_bytes_or_do_not(ranks: Any, stage: int, accumulation: int, zero: dict[str, Any]) -> None:
    for counted, predicted in ranks[2].run(wire.counted_case, stage, "fp32", accumulation, zero):
        assert counted == predicted


@pytest.mark.parametrize("reuse", [20_000, 60_000])
def test_what_is_kept_is_not_gathered_again(ranks: Any, reuse: int) -> None:
    """Between nothing and everything: within a block's worth of parameters (14,400 of 45,664)."""
    zero = {"stage3_max_reuse_distance": reuse, "stage3_prefetch_bucket_size": 0}
    for counted, predicted in ranks[2].run(wire.counted_case, 3, "fp32", 1, zero):
        assert counted["reduce-scatter", 2] == predicted["reduce-scatter", 2]
        assert abs(counted["all-gather", 2] - predicted["all-gather", 2]) <= 4 * 14_400


@pytest.mark.matrix
def test_four_ranks_with_a_copy_in_each_pair(ranks: Any) -> None:
    """hpZ on two "nodes" of two: what is gathered again comes from the pair."""
    for stage in (1, 2, 3):
        for counted, predicted in ranks[4].run(wire.counted_case, stage, "fp32", 1, {}, 8):
            assert counted == predicted
    zero = {"zero_hpz_partition_size": 2, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
    for counted, predicted in ranks[4].run(wire.counted_case, 3, "fp32", 1, zero, 8):
        assert counted == predicted
        assert counted["all-gather", 2] > 0
    for counted, predicted in ranks[4].run(wire.counted_case, 3, "fp32", 1, {}, 8):  # and not once more unasked
        assert counted == predicted


@pytest.fixture(scope="module")
def under_zero2(ranks: Any) -> list[list[float]]:
    """Of each rank."""
    return list(ranks[2].run(wire.file_case, "zero2"))


@pytest.mark.parametrize("name", sorted({*EVERYWHERE} - {"zero2"}))
def test_every_file_that_runs_on_cpu_trains_as_zero2(ranks: Any, under_zero2: list[list[float]], name: str) -> None:
    """Two steps: losses and final weights.  Bound: sums in another order, 1e-5 (`test_trajectories.py`)."""
    got = ranks[2].run(wire.file_case, name)
    assert got == [pytest.approx(rank, rel=1e-5) for rank in under_zero2]
