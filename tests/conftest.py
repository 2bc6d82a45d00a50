"""Shared fixtures: pools of ranks, started once a session on first use."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from mirai_ds.runtime.log import LOG
from tests.rank_pool import RankPool

# torch's compiler would start processes to help it, each of which imports torch: more than they do here.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the package's log says; `start_log` may have cut it off from pytest's."""
    monkeypatch.setattr(LOG, "propagate", True)
    caplog.set_level("INFO", LOG.name)
    return caplog


@pytest.fixture(scope="session")
def ranks() -> Iterator[dict[int, RankPool]]:
    """`ranks[n]`: a pool of n ranks, started when first asked for."""

    class Pools(dict[int, RankPool]):
        def __missing__(self, world: int) -> RankPool:
            self[world] = RankPool(world)
            return self[world]

    pools = Pools()
    yield pools
    for pool in pools.values():
        pool.close()
