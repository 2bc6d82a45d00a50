"""The multiplier on the alignment loss over epochs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from mirai_ds.config import ForesightConfig, build
from mirai_ds.foresight import alignment_active, alignment_multiplier, heads_alone
from tests.one_line import one_line


def config(schedule: dict[str, Any] | None = None, warmup: float = 0.0, method: str = "mirai-e") -> ForesightConfig:
    fields: dict[str, Any] = {"method": method, "warmup_epochs": warmup}
    return ForesightConfig(**fields, schedule=schedule or {})


def test_constant() -> None:
    for epoch in (0.0, 17.3, 299.99, 300.0):
        assert alignment_multiplier(config(), epoch, 300) == 1.0


def test_no_method_no_alignment() -> None:
    assert alignment_multiplier(ForesightConfig(), 50, 300) == 0.0


def test_warm_up_ends_with_its_last_epoch() -> None:
    """15 epochs of next-token loss only; the first step of epoch 15 (from 0) is aligned."""
    c = config(warmup=15)
    last = (15 * 5004 - 1) / 5004
    assert [alignment_multiplier(c, e, 300) for e in (0.0, 14.0, last)] == [0.0, 0.0, 0.0]
    assert [alignment_multiplier(c, e, 300) for e in (15.0, 15.5, 299.0)] == [1.0, 1.0, 1.0]


def test_defaults_of_the_methods() -> None:
    assert alignment_multiplier(ForesightConfig(method="mirai-e"), 14.99, 300) == 0.0
    assert alignment_multiplier(ForesightConfig(method="mirai-e"), 15, 300) == 1.0
    assert alignment_multiplier(ForesightConfig(method="mirai-i"), 0, 300) == 1.0


def test_authors_step_at_epoch_80() -> None:
    c = config({"kind": "step", "at_epochs": [80]})
    last = (80 * 5004 - 1) / 5004
    assert [alignment_multiplier(c, e, 300) for e in (0.0, last, 80.0, 299.0)] == [1.0, 1.0, 0.5, 0.5]
    assert alignment_multiplier(c, 79.99, 80) == 1.0  # independent of the run's length: an 80-epoch run never steps


def test_several_steps() -> None:
    c = config({"kind": "step", "at_epochs": [100, 200]})
    assert [alignment_multiplier(c, e, 300) for e in (99.9, 100.0, 199.9, 200.0)] == [1.0, 0.5, 0.5, 0.25]
    c = config({"kind": "step", "at_epochs": [10, 20], "multipliers": [0.2, 3.0, 0.0]}, warmup=5)
    assert [alignment_multiplier(c, e, 30) for e in (4.9, 5.0, 10.0, 19.9, 20.0)] == [0.0, 0.2, 3.0, 3.0, 0.0]


def test_cosine() -> None:
    c = config({"kind": "cosine", "final": 0.2})
    values = {0.0: 1.0, 75.0: 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2, 150.0: 0.6, 300.0: 0.2}
    for epoch, wanted in values.items():
        assert alignment_multiplier(c, epoch, 300) == pytest.approx(wanted, abs=1e-12)
    assert alignment_multiplier(c, 400, 300) == pytest.approx(0.2)
    falling = [alignment_multiplier(c, e, 300) for e in range(301)]
    assert all(b < a for a, b in itertools.pairwise(falling))


def test_cosine_may_start_later_and_warm_up_does_not_shift_it() -> None:
    c = config({"kind": "cosine", "start_epoch": 100}, warmup=15)
    values = {14.9: 0.0, 15.0: 1.0, 99.0: 1.0, 100.0: 1.0, 200.0: 0.5, 300.0: 0.0}
    for epoch, wanted in values.items():
        assert alignment_multiplier(c, epoch, 300) == pytest.approx(wanted, abs=1e-12), epoch
    spanning = config({"kind": "cosine"}, warmup=30)
    assert alignment_multiplier(spanning, 30, 60) == pytest.approx(0.5)


def test_a_ramp_rises_from_the_end_of_warm_up() -> None:
    c = ForesightConfig(method="mirai-e", warmup_epochs=10, ramp_epochs=4)
    assert [alignment_multiplier(c, e, 100) for e in (9.9, 10.0, 11.0, 13.0, 14.0, 50.0)] == [0, 0, 0.25, 0.75, 1, 1]
    stepped = {"kind": "step", "at_epochs": [12]}
    c = ForesightConfig(method="mirai-e", warmup_epochs=10, ramp_epochs=4, schedule=stepped)  # type: ignore[arg-type]
    assert [alignment_multiplier(c, e, 100) for e in (11.0, 12.0, 14.0)] == [0.25, 0.25, 0.5]
    assert not alignment_active(c, 9.9)
    assert alignment_active(c, 10.0)


def test_heads_learn_alone_at_the_end_of_warm_up() -> None:
    c = ForesightConfig(method="mirai-e", warmup_epochs=10, head_warmup_epochs=3, ramp_epochs=2)
    epochs = (6.9, 7.0, 9.9, 10.0, 12.0)
    assert [alignment_active(c, e) for e in epochs] == [False, True, True, True, True]
    assert [heads_alone(c, e) for e in epochs] == [False, True, True, False, False]
    assert [alignment_multiplier(c, e, 100) for e in epochs] == [0.0, 1.0, 1.0, 0.0, 1.0]
    one_line(
        lambda: build({"foresight": {"method": "mirai-e", "warmup_epochs": 2, "head_warmup_epochs": 3}}),
        "foresight.head_warmup_epochs = 3.0: is the end of warm-up, which has 2 epochs",
    )
