"""The compiled alignment loss writes its gradient before backward: it is right whatever arrives, and free of a second
pass when what arrives is what the objective said."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.upstream_cases import upstream_case
from tests.marks import rest_by_hand


@pytest.mark.parametrize(("stage", "precision", "accumulation", "multiplier"), rest_by_hand(
    [(stage, precision, often, multiplier) for stage in (1, 2, 3)
     for precision, often in (("fp32", 1), ("fp32", 3), ("bf16", 2)) for multiplier in (1.0, 0.3)],
    {(1, "fp32", 1, 0.3), (1, "bf16", 2, 1.0), (2, "fp32", 3, 1.0), (2, "bf16", 2, 0.3), (3, "fp32", 3, 0.3),
     (3, "bf16", 2, 1.0)},
))  # fmt: skip
def test_backward_brings_what_the_objective_said(
    ranks: Any, stage: int, precision: str, accumulation: int, multiplier: float
) -> None:
    for pairs in ranks[2].run(upstream_case, stage, precision, accumulation, multiplier):
        assert len(pairs) == accumulation
        for told, received in pairs:
            assert told == pytest.approx(multiplier / accumulation, rel=1e-12)
            if accumulation == 3:  # 1/3 is rounded on the way: a rescaling by one rounding
                assert received == pytest.approx(told, rel=1e-7)
            else:
                assert received == float(torch.tensor(told))
