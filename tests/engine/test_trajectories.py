"""Loss sequences do not depend on how the work is laid out: ZeRO stage, ranks, recompute, accumulation; dropout on.

Bounds.  fp32: sums over ranks and micro-steps in another order, 20 AdamW steps on: 1e-5 where losses reach 3 (measured:
2.3e-6).  bf16 and bf16-autocast: 4 relative roundings of bf16 (4 * 2^-8) of the largest loss: the losses themselves are
sums of bf16 products, and two layouts round differently.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tests.engine import cases
from tests.marks import by_hand

FP32_BOUND = 1e-5
BF16_ROUNDINGS = 4 * 2.0**-8


@pytest.fixture(scope="module")
def plain(ranks: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The runs written out in plain PyTorch."""
    return {m: np.array(ranks[1].run(cases.plain_losses, m)[0]) for m in ("none", "mirai-e", "mirai-i", "mtp")}


def test_training_moves(plain: dict[str, np.ndarray[Any, Any]]) -> None:
    """The sequences compared below are not flat."""
    assert plain["mirai-e"][0] - plain["mirai-e"][-1] > 2
    assert np.ptp(plain["none"]) > 0.1
    assert np.ptp(plain["mirai-i"]) > 0.1
    assert np.ptp(plain["mtp"]) > 0.1


@pytest.mark.parametrize(("stage", "world"), [
    *((stage, 2) for stage in range(4)), (2, 1), *(by_hand(stage, 1) for stage in (0, 1, 3)),
])  # fmt: skip
def test_every_stage_follows_plain_pytorch(ranks: Any, plain: Any, stage: int, world: int) -> None:
    losses = ranks[world].run(cases.losses_case, "mirai-e", stage)
    assert all(np.array_equal(losses[0], other) for other in losses)
    assert np.abs(np.array(losses[0]) - plain["mirai-e"]).max() <= FP32_BOUND


@pytest.mark.parametrize("method", ["none", "mirai-i", "mtp"])
def test_other_methods_follow_plain_pytorch(ranks: Any, plain: Any, method: str) -> None:
    assert np.abs(np.array(ranks[2].run(cases.losses_case, method, 2, 2)[0]) - plain[method]).max() <= FP32_BOUND


POLICIES = ({"policy": "full"}, {"policy": "every-n"}, {"policy": "full", "implementation": "deepspeed"})


def thinned() -> list[Any]:
    """Each policy on each stage with one of the numbers of micro-steps, in turn; the others only by hand (`make
    test-exhaustive`)."""
    product = itertools.product(("mirai-e", "mirai-i"), range(4), (1, 2, 3), enumerate(POLICIES))
    return [
        pytest.param(method, stage, often, policy,
                     marks=pytest.mark.matrix if place == (stage + often) % 3 else pytest.mark.exhaustive)
        for method, stage, often, (place, policy) in product
    ]  # fmt: skip


@pytest.mark.parametrize(("method", "stage", "accumulation", "policy"), thinned())
def test_recompute_and_accumulation(
    ranks: Any, plain: Any, method: str, stage: int, accumulation: int, policy: dict[str, Any]
) -> None:
    losses = ranks[2].run(cases.losses_case, method, stage, accumulation, policy)[0]
    assert np.abs(np.array(losses) - plain[method]).max() <= FP32_BOUND


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_recompute_replays_dropout_bit_for_bit(ranks: Any, stage: int) -> None:
    """Whole blocks, and their second halves.  Six steps: another mask would be seen in the first."""
    kept, *replayed = (
        ranks[2].run(cases.losses_case, "mirai-e", stage, 1, policy, "fp32", 6)[0]
        for policy in ({}, {"policy": "full"}, {"policy": "mlp"})
    )
    assert replayed == [kept, kept]


@pytest.mark.matrix
@pytest.mark.parametrize("precision", ["bf16", "bf16-autocast"])
def test_low_precision_layouts_agree(ranks: Any, precision: str) -> None:
    runs = {
        (stage, world, accumulation): np.array(
            ranks[world].run(cases.losses_case, "mirai-e", stage, accumulation, None, precision)[0]
        )
        for stage in ([1, 2, 3] if precision == "bf16" else [0, 1, 2, 3])
        for world in (1, 2)
        for accumulation in (1, 3)
    }
    first = next(iter(runs.values()))
    worst = {layout: np.abs(run - first).max() for layout, run in runs.items()}
    assert max(worst.values()) <= BF16_ROUNDINGS * np.abs(first).max(), worst


@pytest.mark.parametrize("convention", ["paper"])
def test_paper_convention_trains(ranks: Any, convention: str) -> None:
    losses = ranks[2].run(cases.losses_case, "mirai-e", 2, 1, None, "fp32", 20, convention)[0]
    assert losses[0] - losses[-1] > 0.5
