"""The plan's memory for GPT-B against the caching allocator's own peak of a real step."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from mirai_ds.benchmarks.memory import RECOMPUTE, case, compare

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("method", ["none", "mirai-e"])
@pytest.mark.parametrize(("precision", "stage"), [("bf16-autocast", 2), ("bf16", 1), ("bf16-autocast", 3)])
@pytest.mark.parametrize("recompute", [RECOMPUTE[0], RECOMPUTE[2]], ids=["none", "full"])
def test_gpt_b_within_ten_percent(method: str, precision: str, stage: int, recompute: dict[str, Any]) -> None:
    """Allocated bytes; the context, workspaces and fragmentation are the plan's allowances, not looked at here."""
    from mirai_ds.engine.start import start_process_group
    from mirai_ds.runtime.distributed import World

    os.environ.setdefault("MASTER_PORT", "29534")
    world = World(0, 0, 1, 1)
    start_process_group(world, 5)
    model = {"size": "GPT-B"}
    row = compare(case(method, precision, stage, recompute, 16, 1, model=model), world, torch.device("cuda", 0))
    assert abs(row["error_percent"]) <= 10.0, row
