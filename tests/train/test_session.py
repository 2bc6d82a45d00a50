"""A session's steps by value: means over micro-batches and images, the teacher's freshness, and what a resume restores.

Real ranks without a command line around them: a case takes a second or two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train import session_cases


def test_metrics_are_means_whatever_the_number_of_micro_batches(ranks: Any, tmp_path: Path) -> None:
    """fp32 sums in another order: losses of 3 agree to 1e-5, as in `tests/engine/test_trajectories.py`."""
    once, twice = (ranks[2].run(session_cases.metrics_case, str(tmp_path), a)[0] for a in (1, 2))
    assert set(once) == set(twice) == {"ntp", "loss", "alignment", "cosine"}
    assert once["loss"][0] > 1
    for name, values in once.items():
        assert twice[name] == pytest.approx(values, abs=1e-5), name


def test_every_held_out_image_counts_as_much(ranks: Any, tmp_path: Path) -> None:
    """Nine images on two ranks, in batches of three: the last batches hold two images and one."""
    for found in ranks[2].run(session_cases.held_out_case, str(tmp_path)):
        assert max(found["parts"]) - min(found["parts"]) > 1e-3  # so that another weighting shows
        assert found["shared"] == pytest.approx(found["whole"], abs=1e-6)


def test_the_teacher_of_a_step_is_the_average_before_it(ranks: Any, tmp_path: Path) -> None:
    assert ranks[2].run(session_cases.teacher_case, str(tmp_path)) == [[[], [], []]] * 2


def test_batches_that_a_rollback_left_out_are_not_trained_on(ranks: Any, tmp_path: Path) -> None:
    assert ranks[2].run(session_cases.left_out_case, str(tmp_path)) == [[True] * 3] * 2


def test_a_resume_after_an_odd_step(ranks: Any, tmp_path: Path) -> None:
    """With two micro-batches a step: the update comes after the second; generators are each rank's own again, and a
    skipped step is not forgotten."""
    found = ranks[2].run(session_cases.resume_case, str(tmp_path))
    assert [one["resumed"] for one in found] == [one["went_on"] for one in found]
    assert found[0]["resumed"]["drawn"] != found[1]["resumed"]["drawn"]
    assert found[0]["resumed"]["applied"] == 1  # of two steps
