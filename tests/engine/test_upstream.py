"""The compiled alignment loss writes its gradient before backward: it is right whatever arrives, and free of a second
pass when what arrives is what the objective said."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.upstream_cases import upstream_case


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("precision", "accumulation"), [("fp32", 1), ("fp32", 3), ("bf16", 2)])
@pytest.mark.parametrize("multiplier", [1.0, 0.3])
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
