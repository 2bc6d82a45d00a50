"""`make gpu-check` itself on a fake GPU: its first slice passes, and what it writes is known for what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gpu.check.import_results import RefusedError, read_folder
from tests.gpu.rehearsal.conftest import FakeGpu

pytestmark = pytest.mark.rehearsal


def test_the_smoke_passes_and_is_no_measurement(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    fake_gpu("-m", "tests.gpu.check", "--slice", "1", "--out", str(tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert {name: step["verdict"] for name, step in summary["steps"].items()} == {
        "1 doctor": "passed",
        "1 demo": "passed",
    }
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["metric"] for row in rows} == {"loss/total", "speed/images_per_s"}
    with pytest.raises(RefusedError, match="a fake device measures nothing"):
        read_folder(tmp_path)


def test_losses_follow_the_cpus(fake_gpu: FakeGpu) -> None:
    """Ten steps on both; on a fake GPU the arithmetic is the CPU's."""
    done = fake_gpu("-m", "tests.gpu.check.losses", "--precision", "fp32", "--steps", "10")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    values = {row["variant"]: float(row["value"]) for row in rows if row["metric"] == "loss"}
    assert len(values) == 4
    assert values["gpu, step 10"] < values["gpu, step 1"]
    (worst,) = [float(row["value"]) for row in rows if row["metric"] == "largest relative difference"]
    assert worst < 1e-5
