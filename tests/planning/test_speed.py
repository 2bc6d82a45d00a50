"""Measured utilisations: equal to the committed rows, used where a step like them is planned, else an assumption."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from mirai_ds.config import load
from mirai_ds.planning.devices import DEVICES
from mirai_ds.planning.speed import ASSUMED_MFU, MEASURED, mfu_of, utilisation

ROWS = Path(__file__).resolve().parents[2] / "docs" / "results" / "gpu.csv"
_GRAPH = "compile `blocks` (mended by hand), whole step as one CUDA graph (prototype)"
ARMS = {
    ("none", 2): "as shipped: ZeRO-2, compile `none`", ("blocks", 0): "ZeRO-0, compile `blocks` (mended by hand)",
    ("captured", 0): f"ZeRO-0, {_GRAPH}", ("captured", 2): f"ZeRO-2, {_GRAPH}",
}  # fmt: skip
PLAIN = ["train.compile=none"]


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row.size}-{row.batch}-{row.way}")
def test_they_are_the_committed_rows(row: object) -> None:
    m = row
    with ROWS.open(newline="", encoding="utf-8") as file:
        found = [
            r for r in csv.DictReader(file)
            if (r["subject"], r["metric"], r["method"], r["model"], r["batch"], r["variant"])
            == ("train step", "step", "E", m.size, str(m.batch), ARMS[m.way, m.stage])  # type: ignore[attr-defined]
        ]  # fmt: skip
    assert [float(r["value"]) for r in found] == [m.milliseconds]  # type: ignore[attr-defined]
    assert all(r["date"] in m.source and r["card"] in m.source for r in found)  # type: ignore[attr-defined]


def test_the_mfus_are_those_that_were_reported() -> None:
    """0.07, 0.17, 0.10 and 0.09 as shipped, by the printed peak of 989 TFLOP/s."""
    found = {(m.size, m.batch): mfu_of(m) for m in MEASURED if m.way == "none"}
    told = {("GPT-B", 32): 0.07, ("GPT-B", 128): 0.17, ("GPT-L", 32): 0.10, ("GPT-XL", 16): 0.09}
    assert found == pytest.approx(told, abs=0.006)


def test_the_nearest_batch_counts() -> None:
    h200, config = DEVICES["h200-141g"], load("mirai-e-b", PLAIN)
    by_batch = {m.batch: mfu_of(m) for m in MEASURED if (m.size, m.way) == ("GPT-B", "none")}
    for micro, batch in ((32, 32), (16, 32), (48, 32), (128, 128), (100, 128), (256, 128)):
        found = utilisation(h200, config, micro)
        assert found.kind == "measured"
        assert found.mfu == by_batch[batch]
        assert f"batch {batch}" in found.source


def test_of_smaller_batches_the_milliseconds_are_taken() -> None:
    """A step of 8 images takes what one of 32 takes, 101.6 ms, if the host is the bottleneck: a quarter of its MFU."""
    found = utilisation(DEVICES["h200-141g"], load("mirai-e-b", PLAIN), 8)
    assert found.kind == "estimated"
    assert found.mfu == pytest.approx(mfu_of(MEASURED[0]) / 4)
    assert "the host is the bottleneck" in found.source


@pytest.mark.parametrize(("recipe", "micro"), [("mirai-e-b", 512), ("mirai-e-l", 256), ("mirai-e-xl", 128)])
def test_of_larger_batches_and_other_sizes_the_best_is_taken(recipe: str, micro: int) -> None:
    """0.17, of GPT-B at 128, as shipped: the device's own share at batch 32 (101.6 ms of which it works 42.6)."""
    found = utilisation(DEVICES["h200-141g"], load(recipe, PLAIN), micro)
    assert (found.kind, found.mfu) == ("estimated", max(mfu_of(m) for m in MEASURED if m.way == "none"))
    assert found.mfu == pytest.approx(mfu_of(MEASURED[0]) * 101.6 / 42.6, rel=0.02)
    assert "GPT-B, Mirai-E, batch 128" in found.source


def test_an_h100_is_told_from_an_h200() -> None:
    """The same chip: an estimate, and whose."""
    found = utilisation(DEVICES["h100-80g"], load("mirai-e-b", PLAIN), 32)
    assert (found.kind, found.mfu) == ("estimated", mfu_of(MEASURED[0]))
    assert "H200" in found.source


def test_what_was_not_measured_is_an_assumption_and_says_so() -> None:
    h200, config = DEVICES["h200-141g"], load("mirai-e-b", PLAIN)
    for device, settings in ((DEVICES["a100-80g"], []), (h200, ["train.precision=fp32"])):
        found = utilisation(device, load("mirai-e-b", [*PLAIN, *settings]), 32)
        assert (found.mfu, found.kind) == (ASSUMED_MFU, "assumed")
        assert "assumption" in found.source
    compiled = utilisation(h200, load("mirai-e-b", ["train.compile=blocks"]), 32)
    assert compiled.mfu == pytest.approx(mfu_of(MEASURED[0]) * 101.6 / 56.6)
    assert utilisation(h200, config, 32, asked=0.3).mfu == 0.3


def test_a_captured_step_is_planned_by_captured_ones() -> None:
    """The default on GPUs: 0.31 and 0.37 of the peak, 0.36 for L, 0.32 for XL.  No host holds a small batch up."""
    h200 = DEVICES["h200-141g"]
    told = {("b", 32): 0.31, ("b", 128): 0.37, ("l", 32): 0.36, ("xl", 16): 0.32}
    for (size, micro), mfu in told.items():
        found = utilisation(h200, load(f"mirai-e-{size}", []), micro, captured=True)
        assert (found.kind, found.mfu) == ("measured", pytest.approx(mfu, abs=0.006))
        assert "captured" in found.source
    small = utilisation(h200, load("mirai-e-b", []), 8, captured=True)
    assert (small.kind, small.mfu) == ("estimated", pytest.approx(0.31, abs=0.006))  # of 32 images, at most
    assert utilisation(h200, load("mirai-e-b", []), 32).mfu == mfu_of(MEASURED[4])  # on ZeRO-3: compiled only
