"""A start is measured from the command to its first step, in parts that are all there."""

from __future__ import annotations

import pytest

from mirai_ds.tools.bench import startup


@pytest.mark.matrix
def test_every_part_of_a_start_is_seen() -> None:
    found = startup.one_start([], 1)
    assert list(found) == list(startup.PHASES)
    assert all(seconds > 0 for seconds in found.values())
    assert found["imports"] > found["folder"]  # torch and DeepSpeed against a folder and a lock
