"""What makes a step faster or smaller leaves its losses alone: chunked loss, compiled blocks, recomputed halves.

Bounds as in test_trajectories: fp32 1e-5 over 20 steps against plain PyTorch; the compiler fuses and so sums in another
order, no more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.engine import cases, reads
from tests.engine.test_trajectories import BF16_ROUNDINGS, FP32_BOUND
from tests.marks import by_hand

COMPILED = {"compile": "blocks"}
POLICIES = ({}, {"policy": "mlp"}, {"policy": "every-n"}, {"policy": "full"},
            {"policy": "full", "implementation": "deepspeed"}, {"policy": "budget", "budget": 0.3})  # fmt: skip


@pytest.fixture(scope="module")
def plain(ranks: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The runs written out in plain PyTorch: all logits at once, nothing compiled, everything kept."""
    return {m: np.array(ranks[1].run(cases.plain_losses, m)[0]) for m in ("none", "mirai-e", "mirai-i", "mtp")}


def off(losses: Any, wanted: Any) -> float:
    return float(np.abs(np.array(losses) - wanted).max())


@pytest.mark.parametrize("stage", [by_hand(0), by_hand(2), 3])
def test_all_logits_at_once(ranks: Any, plain: Any, stage: int) -> None:
    """`whole`; every other test of trajectories runs `chunked`, the default."""
    losses = ranks[2].run(cases.losses_case, "mirai-e", stage, train={"cross_entropy": "whole"})[0]
    assert off(losses, plain["mirai-e"]) <= FP32_BOUND


@pytest.mark.parametrize(("method", "world"), [("none", 1), pytest.param("mirai-e", 2, marks=pytest.mark.matrix)])
def test_compiled_blocks(ranks: Any, plain: Any, method: str, world: int) -> None:
    """Each rank compiles for itself, and so does the teacher."""
    losses = ranks[world].run(cases.losses_case, method, 3, train=COMPILED)
    assert all(losses[0] == other for other in losses)
    assert off(losses[0], plain[method]) <= FP32_BOUND


def thinned() -> list[Any]:
    """Each policy once, and each stage, as each compiles for seconds; the others by hand (`make test-exhaustive`)."""
    return [
        pytest.param(stage, policy,
                     marks=pytest.mark.matrix if stage == (place + 2) % 4 else pytest.mark.exhaustive)
        for stage in range(4) for place, policy in enumerate(POLICIES)
    ]  # fmt: skip


@pytest.mark.parametrize(("stage", "policy"), thinned())
def test_compiled_blocks_in_every_layout(ranks: Any, plain: Any, stage: int, policy: dict[str, Any]) -> None:
    losses = ranks[2].run(cases.losses_case, "mirai-e", stage, 2, policy, train=COMPILED)[0]
    assert off(losses, plain["mirai-e"]) <= FP32_BOUND


@pytest.mark.matrix
@pytest.mark.parametrize("method", ["mirai-i", "mtp"])
def test_compiled_blocks_with_other_methods(ranks: Any, plain: Any, method: str) -> None:
    assert off(ranks[2].run(cases.losses_case, method, 2, train=COMPILED)[0], plain[method]) <= FP32_BOUND


@pytest.mark.parametrize(("precision", "stage", "switch"), [
    pytest.param("bf16", 3, {"cross_entropy": "whole"}, marks=pytest.mark.matrix),
    pytest.param("bf16-autocast", 2, COMPILED, marks=pytest.mark.matrix),
    pytest.param("bf16", 3, COMPILED, marks=pytest.mark.exhaustive),
    pytest.param("bf16-autocast", 2, {"cross_entropy": "whole"}, marks=pytest.mark.exhaustive),
])  # fmt: skip
def test_switches_in_low_precision(ranks: Any, precision: str, stage: int, switch: dict[str, Any]) -> None:
    usual, switched = (
        np.array(ranks[2].run(cases.losses_case, "mirai-e", stage, 1, None, precision, train=train)[0])
        for train in ({}, switch)
    )
    assert off(switched, usual) <= BF16_ROUNDINGS * np.abs(usual).max()


@pytest.mark.parametrize(("method", "stage", "precision"), [
    by_hand("mirai-e", 0, "fp32"), ("mirai-e", 1, "bf16"), ("mirai-e", 2, "bf16-autocast"), ("mtp", 2, "fp32"),
    ("mirai-e", 3, "fp32"),
])  # fmt: skip
def test_a_step_reads_nothing_from_the_device(ranks: Any, method: str, stage: int, precision: str) -> None:
    """Between logging points: neither the trainer nor DeepSpeed."""
    for found in ranks[2].run(reads.reads_case, method, stage, precision):
        assert found == {}
