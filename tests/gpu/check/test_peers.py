"""A race: arms take turns, one that dies leaves the others racing, and what was measured becomes rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mirai_ds.benchmarks.arms import BenchArm
from mirai_ds.benchmarks.device_time import busy, kind_of
from tests.gpu.check.peer_training import last, last_speed
from tests.gpu.check.peers import GROUPS, OURS, WARM_UP, arms, race, rows

STUB = "tests.gpu.check.told_arm"
PROFILE = {"busy_ms": 22.6, "launches": 1500.0, "kinds": {"attention": 1.4}}


def arm(name: str, seconds: float, **settings: Any) -> BenchArm:
    answers = {"run": {"seconds": seconds}, "profile": PROFILE, "memory": {"peak": 6.5e9}}
    return BenchArm(name, "", module=STUB, settings={"answers": answers, **settings})


def test_each_arm_has_its_time_and_a_dead_one_stops_no_other(capfd: pytest.CaptureFixture[str]) -> None:
    entries = [arm("dies early", 1.0, dies_at=2), arm("fast", 0.02), arm("dies late", 1.0, dies_at=WARM_UP + 1),
               arm("slow", 0.05)]  # fmt: skip
    found = {entry.name: result for entry, result in race(entries, turns=3, steps=5, profiled=2)}
    assert {name: result["seconds"] for name, result in found.items()} == {"fast": 0.02, "dies late": 1.0, "slow": 0.05}
    assert found["fast"] == {"seconds": 0.02, "peak": 6.5e9, **PROFILE}
    assert found["dies late"] == {"seconds": 1.0}  # of its one turn; nothing else was answered
    said = capfd.readouterr().err
    assert "dies early: a process ended with 1" in said
    assert "dies late: its process has ended before" in said


def test_rows() -> None:
    found = list(rows(arm("ours", 0.02), {"seconds": 0.02314, "peak": 6.5e9, **PROFILE}, "GPT-B", 32, "E"))
    assert [(r["subject"], r["metric"], r["value"], r["unit"]) for r in found] == [
        ("train step", "step", "23.14", "ms"), ("train step", "device time", "22.6", "ms"),
        ("train step", "launches and copies", "1500", "calls"), ("device time of a step", "attention", "1.4", "ms"),
        ("train step", "peak memory", "6.50", "GB"),
    ]  # fmt: skip
    assert {(r["model"], r["method"], r["batch"], r["variant"]) for r in found} == {("GPT-B", "E", "32", "ours")}
    assert [r["metric"] for r in rows(arm("x", 1), {"seconds": 1.0}, "GPT-B", 32, "E")] == ["step"]


@pytest.mark.parametrize("group", GROUPS)
def test_the_arms_of_a_group_load(group: str, tmp_path: Path) -> None:
    """Ours are recipes with settings that the schema knows; theirs name an owner for each method."""
    from mirai_ds.config import load

    size, batch, method = GROUPS[group]
    found = arms(tmp_path, size, batch, method, [])
    theirs, ours = found[:2], found[2:]
    assert [a.settings["compiled"] for a in theirs] == [True, False]
    assert {a.settings["owner"] for a in theirs} == {"LlamaGen" if method == "none" else "Mirai"}
    assert [a.name for a in ours] == list(OURS)
    for entry in ours:
        config = load(entry.recipe, entry.overrides)
        assert (config.model.size, config.train.global_batch_size) == (size, batch)
        assert config.foresight.active == (method != "none")


def test_device_time_is_the_union_of_kernels() -> None:
    """Two streams at once count once."""
    assert busy([(10, 20), (0, 4), (15, 30), (16, 18), (40, 41)]) == 4 + 20 + 1
    assert busy([]) == 0
    names = {"sm90_xmma_gemm_bf16": "matrix products", "pytorch_flash::flash_fwd_kernel": "attention",
             "triton_poi_fused_mul_3": "Triton's kernels", "Memcpy HtoD (Pinned -> Device)": "copies and memsets",
             "vectorized_elementwise_kernel": "eager elementwise", "multi_tensor_apply<FusedAdamMath>": "AdamW",
             "mirai::foresight_cosine_forward": "alignment kernel", "ncclDevKernel_AllReduce": "NCCL"}  # fmt: skip
    assert {name: kind_of(name) for name in names} == names


def test_speeds_are_read_from_what_both_sides_log(tmp_path: Path) -> None:
    theirs = "Loss: 9.1, Train Steps/Sec: 3.10\nLoss: 9.0, Train Steps/Sec: 14.50\n"
    assert last(theirs, r"Train Steps/Sec: ([\d.]+)") == 14.5
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(
        '{"step": 20, "speed/images_per_s": 100.0}\n{"step": 40, "speed/images_per_s": 254.3}\n{"end": 1}\n'
    )
    assert last_speed(metrics) == 254.3
    for wrong in (lambda: last("nothing", "x=(1)"), lambda: last_speed(metrics.with_name("empty"))):
        metrics.with_name("empty").touch()
        with pytest.raises(RuntimeError):
            wrong()
