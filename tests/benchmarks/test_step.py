"""The benchmark of steps: its baseline trains the same thing, and its rows say what was measured."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mirai_ds.benchmarks import step as bench
from mirai_ds.benchmarks.arms import BenchArm, Workers, allocated_by_malloc
from tests.benchmarks.pages import check_page

NO_DROPOUT = [f"model.{name}=0" for name in ("token_dropout", "resid_dropout", "ffn_dropout", "class_dropout")]
TINY = [*NO_DROPOUT, "foresight.warmup_epochs=0", "train.global_batch_size=8", "train.grad_accum_steps=1",
        "train.recompute.policy=none", "train.precision=fp32", "deepspeed=zero2", "optimizer.warmup_steps=0",
        "optimizer.schedule=constant", "optimizer.final_lr=0", "ema.decay=0.9",
        "eval.classifier.enabled=false"]  # fmt: skip

PARTS = {"data", "teacher forward", "teacher refresh", "forward", "heads and alignment", "backward", "optimizer", "EMA"}


def trained(plain: bool, method: str = "digits-mirai-e") -> dict[str, Any]:
    """Losses of six steps, then the parts and the memory of one more."""
    overrides = [o for o in TINY if method == "digits-mirai-e" or not o.startswith("foresight.")]
    workers = Workers(BenchArm("plain" if plain else "mirai_ds", method, overrides, plain))
    try:
        losses = [workers.ask("step")[0]["loss"] for _ in range(6)]
        return {"losses": losses, **workers.ask("parts")[0], **workers.ask("memory")[0]}
    finally:
        workers.close()


@pytest.mark.matrix
def test_the_baseline_trains_the_same_thing() -> None:
    """Without dropout, which the two draw differently, both follow one curve: sums in another order, six AdamW steps on
    (bound as in tests/engine/test_trajectories.py)."""
    ours, plain = trained(False), trained(True)
    assert np.ptp(plain["losses"]) > 0.3
    assert np.abs(np.subtract(ours["losses"], plain["losses"])).max() <= 1e-5
    for found in (ours, plain):
        assert set(found["parts"]) >= PARTS
        assert all(seconds > 0 for seconds in found["parts"].values())
        # A step holds more than lies between steps, which are at least weights, two moments and an average in fp32.
        assert found["peak"] > found["resting"] > 4 * 4 * 1_000_000


def test_malloc_is_seen() -> None:
    before = allocated_by_malloc()
    block = np.ones(50_000_000, np.uint8)
    assert allocated_by_malloc() - before >= 50_000_000
    del block


def rows() -> list[dict[str, str]]:
    row = dict.fromkeys(bench.FIELDS, "x")
    return [row | {"variant": "plain", "parts": json.dumps({"forward": 1.0, "backward": 3.0})},
            row | {"variant": "ours", "parts": json.dumps({"backward": 1.0, "EMA": 1.0})}]  # fmt: skip


def test_parts_are_percentages_of_each_step() -> None:
    lines = bench.parts_table(rows()).splitlines()
    assert lines[0] == "| variant | backward | EMA | forward |"
    assert lines[2:] == ["| plain, x | 75.0 | 0.0 | 25.0 |", "| ours, x | 50.0 | 50.0 | 0.0 |"]


def test_rows_come_from_turns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ratios are of neighbouring steps: a slow moment that meets both sides changes nothing."""
    slow = [1.0, 5.0, 1.0]

    def turns(arms: list[BenchArm], rounds: int) -> list[dict[str, Any]]:
        memory = {"peak": 4_000_000_000, "resting": 1_000_000_000, "resident": 5_000_000_000}
        return [
            {"seconds": [s * (2 if a.plain else 1) for s in slow], "loss": 1.5, "parts": {"rest": 1.0},
             "memory": {**memory, "peak": memory["peak"] // (1 if a.plain else 2)}}
            for a in arms
        ]  # fmt: skip

    monkeypatch.setattr(bench, "take_turns", turns)
    out = tmp_path / "rows.csv"
    assert bench.main(["plain", "--methods", "E", "--rounds", "3", "--batch", "8", "--out", str(out), "--json"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    with out.open() as file:
        assert list(csv.DictReader(file)) == printed
    plain, ours, alike = printed
    assert (plain["times_as_fast"], ours["times_as_fast"], alike["times_as_fast"]) == ("1.000", "2.000", "2.000")
    assert [row["variant"] for row in printed] == ["plain", "mirai_ds", "mirai_ds, fp32 teacher"]
    assert (plain["memory_ratio"], ours["memory_ratio"]) == ("1.000", "0.500")
    assert ours["command"] == "mirai-ds bench step plain --methods E --rounds 3 --batch 8 --json"


def test_arms_share_what_is_not_compared() -> None:
    args: argparse.Namespace = bench.arguments(["plain", "overhead", "ranks", "switches", "--methods", "none,E,I"])
    args.gpus = 0
    for comparison, _, arms in bench.comparisons(args):
        batches = {o for a in arms for o in a.overrides if o.startswith("train.global_batch_size")}
        assert len(batches) == 1, comparison
        assert len({(a.ranks, a.threads) for a in arms}) == 1, comparison
        if comparison != "switches":  # of which one is another precision
            precisions = {[o for o in a.overrides if o.startswith("train.precision")][-1] for a in arms}
            assert precisions == {"train.precision=bf16-autocast"}, comparison
    assert {c for c, _, _ in bench.comparisons(args)} == set(bench.COMPARISONS)


def test_a_wrong_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.arguments(["speed"])
    assert "what: 'speed' is none of plain, overhead, ranks, switches" in capsys.readouterr().err


def test_the_page_shows_the_committed_rows() -> None:
    check_page("performance.md", "step", bench.table)
