"""How a rank learns that another machine is gone: by its heartbeats, or by the key-value store's own end."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from mirai_ds.runtime import peers
from mirai_ds.runtime.launcher import World
from mirai_ds.runtime.peers import Peers
from mirai_ds.runtime.processes import Identity
from tests.waiting import wait_until

HERE = Identity.of(os.getpid())
THERE = replace(HERE, host="node2", space="another boot")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(peers, "GRACE_SECONDS", 0.05)
    monkeypatch.setattr(peers, "SILENCE_SECONDS", 1.0)


def test_a_machine_that_beats_no_more_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks here and two there; rank 2's heartbeat stands for both of its machine.  On a clock of its own."""
    store, clock = dist.HashStore(), [100.0]
    watched = Peers(World(0, 0, 4, 2), [HERE, HERE, THERE, THERE], None, lambda _: None)
    watched.close()
    watched._store = store
    monkeypatch.setattr(peers, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    for count in range(5):
        store.set("beat/2", str(count))
        assert watched._look_further(count) == ""
        clock[0] += 0.9
    assert store.get("beat/0") == b"4"  # its own, for the others
    assert watched._look_further(5) == ""
    clock[0] += 0.2
    assert watched._look_further(6) == "rank 2's machine (node2) has been silent for 1 s"
    store.set("beat/2", "5")  # it was slow, not dead
    assert watched._look_further(7) == ""


def test_a_store_that_does_not_answer_is_rank_0s_end() -> None:
    class Gone:
        def set(self, *_: str) -> None:
            raise RuntimeError("connection reset")

    told: list[str] = []
    Peers(World(2, 0, 3, 1), [THERE, THERE, HERE], Gone(), told.append)
    wait_until("rank 0 is told to be gone", lambda: told == ["rank 0 is gone (its key-value store does not answer)"])


def test_who_has_closed_looks_no_more() -> None:
    """The end of a run: the others may leave."""
    told: list[str] = []
    watched = Peers(World(0, 0, 2, 2), [HERE, replace(HERE, started="1")], None, told.append)
    watched.close()
    time.sleep(0.3)
    assert told == []
