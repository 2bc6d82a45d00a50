"""From any world size and ZeRO stage to any other, without a conversion: same samples, same losses within a bound."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mirai_ds.checkpoint import store
from mirai_ds.checkpoint.format import StateReader
from tests.resume import elastic_cases
from tests.resume.elastic_cases import SAVED, STEPS

LAYOUTS = list(itertools.product((1, 2, 4), (0, 1, 2, 3)))  # (world size, ZeRO stage)
# Losses lie between 2.5 and 6. fp32: sums in another order. bf16: one rounding (2^-8) of the smallest of them, and with
# fp32 weights and residuals a third of that.
BOUNDS = {"fp32": 1e-5, "bf16-autocast": 3e-3, "bf16": 1e-2}


@pytest.fixture(scope="module")
def origins(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`origins(world, stage, precision)`: a run saved there once, and how it went on."""
    base, made = tmp_path_factory.mktemp("origins"), {}

    def origin(world: int, stage: int, precision: str) -> tuple[Path, dict[str, Any]]:
        key = (world, stage, precision)
        if key not in made:
            run = base / f"{world}-{stage}-{precision}"
            results = ranks[world].run(elastic_cases.save_case, str(run), stage, precision)
            assert all(result == results[0] for result in results)
            made[key] = (run, results[0])
        return made[key]

    return origin


def check(
    ranks: Any,
    origins: Any,
    tmp_path: Path,
    source: Any,
    target: Any,
    precision: str,
    zero: dict[str, Any] | None = None,
) -> float:
    """Resume `source`'s checkpoint on `target`; the largest difference of a loss."""
    run, went_on = origins(*source, precision)
    moved_run = tmp_path / f"to-{target[0]}-{target[1]}"
    results = ranks[target[0]].run(elastic_cases.resume_case, str(run), str(moved_run), target[1], precision, zero)
    assert all(result == results[0] for result in results)
    moved = results[0]
    assert moved["samples"] == went_on["samples"]
    assert len({tuple(batch) for batch in moved["samples"]}) == STEPS
    # The state arrives to the last bit, EMA included.
    reader = StateReader(store.folder_of(run, SAVED))
    for kind, ours in (("master", "raw"), ("ema", "ema")):
        for name in reader.shapes:
            assert (
                moved["state"][f"{ours}/{name}"]
                == reader.read(kind, name).double().view(reader.shapes[name]).sum().item()
            )
    assert len(set(went_on["losses"])) == STEPS
    # And is written again by any layout: EMA and moments after STEPS more steps lie within the bound too.
    if precision == "fp32":
        compare_states(StateReader(store.folder_of(moved_run, SAVED + STEPS)), reader)
    return max(abs(a - b) for a, b in zip(moved["losses"], went_on["losses"], strict=True))


def compare_states(later: StateReader, earlier: StateReader) -> None:
    """The same tensors, moved on by some steps."""
    assert later.shapes == earlier.shapes
    # AdamW counts all steps for the GPT, and for the heads those since they woke up after three.
    assert set(later.steps.values()) == {SAVED + STEPS, SAVED + STEPS - 3}
    moved = [n for n in later.shapes if not torch.equal(later.read("ema", n), earlier.read("ema", n))]
    assert len(moved) == len(later.shapes)


@pytest.mark.parametrize(("source", "target"), [((2, 2), (1, 3)), ((1, 1), (2, 3)), ((2, 3), (2, 0)), ((1, 0), (2, 1))])
def test_some_moves(ranks: Any, origins: Any, tmp_path: Path, source: Any, target: Any) -> None:
    assert check(ranks, origins, tmp_path, source, target, "fp32") <= BOUNDS["fp32"]


@pytest.mark.parametrize("partition", [1, 2])
def test_no_copy_of_the_old_weights_outlives_a_resume(ranks: Any, origins: Any, tmp_path: Path, partition: int) -> None:
    """hpZ keeps a second copy of the weights for the backward pass, made when they were first gathered."""
    zero = {
        "zero_hpz_partition_size": partition, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0,
        "stage3_param_persistence_threshold": 0,
    }  # fmt: skip
    assert check(ranks, origins, tmp_path, (2, 2), (2, 3), "fp32", zero) <= BOUNDS["fp32"]


def in_turn() -> list[Any]:
    """Every world size and every stage is left once; the other sources only by hand (`make test-exhaustive`)."""
    often = [(1, 0), (2, 2), (4, 1), (4, 3)]
    return [
        pytest.param(s, marks=pytest.mark.matrix if s in often else pytest.mark.exhaustive, id=f"{s[0]}x-zero{s[1]}")
        for s in LAYOUTS
    ]


@pytest.mark.parametrize("source", in_turn())
def test_from_each_layout_to_every_other(
    ranks: Any, origins: Any, tmp_path: Path, source: Any, record_property: Any
) -> None:
    worst = {target: check(ranks, origins, tmp_path, source, target, "fp32") for target in LAYOUTS}
    record_property("worst", max(worst.values()))
    assert max(worst.values()) <= BOUNDS["fp32"], worst
    assert worst[source] == 0.0  # the same layout: bit-identical


@pytest.mark.matrix
@pytest.mark.parametrize("precision", ["bf16-autocast", "bf16"])
def test_moves_in_low_precision(ranks: Any, origins: Any, tmp_path: Path, precision: str, record_property: Any) -> None:
    """From every second layout that has this precision to one of another world size."""
    layouts = [layout for layout in LAYOUTS if precision != "bf16" or layout[1] != 0]
    pairs = list(zip(layouts, [*layouts[5:], *layouts[:5]], strict=True))[::2]
    worst = {pair: check(ranks, origins, tmp_path, *pair, precision) for pair in pairs}
    record_property("worst", max(worst.values()))
    assert max(worst.values()) <= BOUNDS[precision], worst
    assert all(math.isfinite(value) for value in worst.values())
