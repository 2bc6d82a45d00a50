"""No two streams touch the same memory unordered, on any stage; and where the order is taken away, races are seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.rehearsal.conftest import FakeGpu
from tests.gpu.rehearsal.test_steps import case

pytestmark = pytest.mark.rehearsal
BATCH = {"micro_batch_size": 4}  # two micro-batches a step
OVERLAP = {"overlap_comm": True}


def run(fake_gpu: FakeGpu, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    (folder / "case.json").write_text(json.dumps(settings), encoding="utf-8")
    fake_gpu("-m", "tests.gpu.rehearsal.races", str(folder / "case.json"), str(folder / "result.json"))
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16-autocast"), (1, "bf16"), (2, "bf16"), (3, "bf16-autocast")])
def test_streams_are_ordered(fake_gpu: FakeGpu, tmp_path: Path, stage: int, precision: str) -> None:
    settings = case("mirai-e", stage, precision, train=BATCH, zero=OVERLAP if stage else {})
    found = run(fake_gpu, tmp_path, settings)
    assert found["races"] == {}
    assert found["launches"] > 1000
    assert found["streams"] >= (2 if stage >= 2 else 1)


def test_a_race_is_seen(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    """With overlap the gradients' norm is right only because the update's stream waits for the reduction's."""
    settings = case("mirai-e", 2, "bf16", train=BATCH, zero=OVERLAP) | {"without_join": True}
    found = run(fake_gpu, tmp_path, settings)
    assert any("update.py" in place for place in found["races"]), found
