"""Statistics of a study against numbers worked out by hand or taken from tables."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mirai_ds.config import UserError
from mirai_ds.study.results import (
    Results,
    estimate,
    first_reached,
    paired_difference,
    speed_up,
    value_at,
)
from mirai_ds.study.rows import Rows
from tests.study.rows_by_hand import rows_by_hand

T_2 = 4.302653  # Student's t, 2 degrees of freedom, two-sided 95 %: any statistics table


def test_interval_of_three_values() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(T_2 * 1.0 / math.sqrt(3), rel=1e-6)
    assert estimate([10.0, 11.0, 12.0]).differs
    assert not estimate([1.0, 2.0, 3.0]).differs


def test_one_value_has_no_interval() -> None:
    found = estimate([0.5])
    assert found.mean == 0.5
    assert math.isnan(found.half)
    assert not found.differs


def test_pairing_takes_the_seed_out() -> None:
    """Seeds differ by 100, the arm by -1, -1.1, -0.9 of each: only the differences' spread counts."""
    baseline = {0: 0.0, 1: 100.0, 2: 200.0, 7: 5.0}
    found = paired_difference({0: -1.0, 1: 98.9, 2: 199.1, 9: 0.0}, baseline)
    assert found.pairs == 3
    assert found.mean == pytest.approx(-1.0)
    assert found.half == pytest.approx(T_2 * 0.1 / math.sqrt(3))
    assert found.differs


def test_first_reached_interpolates() -> None:
    at, values = np.array([0.0, 1.0, 2.0, 3.0]), np.array([4.0, 2.0, 2.5, 1.0])
    assert first_reached(at, values, 3.0) == 0.5
    assert first_reached(at, values, 2.0) == 1.0
    assert first_reached(at, values, 1.75) == pytest.approx(2.5)  # the rise before counts for nothing
    assert first_reached(at, values, 5.0) == 0.0
    assert first_reached(at, values, 0.5) == math.inf


def test_speed_up_is_the_inverse_of_the_other_way_round() -> None:
    at = np.array([0.0, 2.0, 4.0])
    slow, fast = np.array([4.0, 3.0, 2.0]), np.array([4.0, 2.0, 1.0])
    assert speed_up((at, slow), (at, fast)) == 2.0  # 2.0 after 2 epochs instead of 4
    assert speed_up((at, fast), (at, slow)) == 0.5
    assert speed_up((at, slow), (at, slow)) == 1.0


def test_value_at_does_not_extrapolate() -> None:
    at, values = np.array([0.0, 2.0]), np.array([4.0, 2.0])
    assert value_at(at, values, 0.5) == 3.5
    assert math.isnan(value_at(at, values, 2.1))


def test_equal_compute_reads_the_arm_earlier() -> None:
    """A step of the arm costs twice the baseline's from step 20 on: the baseline's 40 steps are 20 + 2 * 10."""
    results = Results(rows_by_hand(), "digits")
    found = results.equal_compute("e-official", "ntp_ema")
    # At step 30, between the points of steps 20 and 40: (2.0 + 1.0) / 2 = 1.5 of seed 0; the baseline ended at 1.2.
    assert found.mean == pytest.approx(0.3)
    assert found.pairs == 3
    assert results.difference("e-official", "ntp_ema").mean == pytest.approx(-0.2)
    assert results.baseline_epochs("e-official", "ntp_ema") == [math.inf] * 3


def test_a_study_without_its_baseline() -> None:
    rows = rows_by_hand()
    alone = Rows([row for row in rows.runs if row.arm != "baseline"], rows.curves, rows.costs, rows.facts)
    with pytest.raises(UserError, match="no run of the arm 'baseline'"):
        Results(alone, "digits")


def test_a_run_without_its_curve() -> None:
    rows = rows_by_hand()
    short = Rows(rows.runs, [row for row in rows.curves if row.seed != 1], rows.costs, rows.facts)
    with pytest.raises(UserError, match="seed 1 has a row but no curve"):
        Results(short, "digits")
