"""Ranks that know of each other from their first second on.

A dead rank is noticed by a collective that fails, but only where the others are in one that is connected to it: not
while the process group forms, the data are read or the first step compiles.  So the ranks meet at a key-value store
before anything that is slow, and from then on a thread of each looks after the processes of its own machine, by number
and start time, and one rank a machine after the other machines, by heartbeats.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from mirai_ds.config.errors import UserError
from mirai_ds.runtime.launcher import World
from mirai_ds.runtime.log import LOG
from mirai_ds.runtime.processes import Identity

CONNECT_SECONDS = 3.0
TOLD_AFTER_SECONDS = 20.0  # of waiting for others, and again each minute
SILENCE_SECONDS = 60.0  # without a heartbeat for so long, another machine is taken for dead
LOOK_SECONDS = 1.0
GRACE_SECONDS = 3.0  # for this rank to end by itself, with a better reason


class Peers:
    """The other ranks of this start, watched until `close`."""

    def __init__(self, world: World, everyone: list[Identity], store: Any, on_gone: Callable[[str], None]) -> None:
        self.world, self.everyone, self._store, self._on_gone = world, everyone, store, on_gone
        spaces = [one.space for one in everyone]
        self._first_here = spaces.index(spaces[world.rank]) == world.rank
        self._machines = sorted({spaces.index(space) for space in spaces})  # the first rank of each
        self._stop = threading.Event()
        self._beats: dict[int, tuple[bytes, float]] = {}
        threading.Thread(target=self._watch, daemon=True, name="peers").start()

    def close(self) -> None:
        """Stop watching: from now on the others may end."""
        self._stop.set()

    def _watch(self) -> None:
        count = 0
        while not self._stop.wait(LOOK_SECONDS):
            count += 1
            text = next((f"rank {r} is gone ({one.host}, pid {one.pid})" for r, one in enumerate(self.everyone)
                         if one.is_gone()), "")  # fmt: skip
            text = text or (self._look_further(count) if len(self._machines) > 1 else "")
            if text and not self._stop.wait(GRACE_SECONDS):
                self._on_gone(text)
                return

    def _look_further(self, count: int) -> str:
        """What has become of the other machines: theirs is the first rank's heartbeat."""
        try:
            if self._first_here:
                self._store.set(f"beat/{self.world.rank}", str(count))
            for rank in self._machines:
                key = f"beat/{rank}"
                beat = self._store.get(key) if self._store.check([key]) else b""
                now = time.monotonic()
                if self._beats.get(rank, (None, 0.0))[0] != beat:
                    self._beats[rank] = (beat, now)
                elif now - self._beats[rank][1] > SILENCE_SECONDS:
                    host = self.everyone[rank].host
                    return f"rank {rank}'s machine ({host}) has been silent for {SILENCE_SECONDS:g} s"
        except RuntimeError:  # the store lives in rank 0, or its launcher
            return "rank 0 is gone (its key-value store does not answer)"
        return ""


def meet(
    world: World, minutes: float, on_gone: Callable[[str], None], look: Callable[[], None] = lambda: None
) -> Peers | None:
    """Wait until every rank is there, and watch them from then on; None for a rank alone.

    MASTER_ADDR and MASTER_PORT must be set.  Says after 20 s whom it waits for, and calls `look` meanwhile, which may
    end the process.  Raises UserError when rank 0 cannot listen there, or somebody has not come within `minutes`.
    """
    if world.size == 1:
        return None
    store, until = _store(world, minutes, look), time.monotonic() + 60 * minutes
    store.set(f"here/{world.rank}", json.dumps(asdict(Identity.of(os.getpid()))))
    told = time.monotonic() + TOLD_AFTER_SECONDS
    while missing := [rank for rank in range(world.size) if not store.check([f"here/{rank}"])]:
        look()
        now = time.monotonic()
        if now > until:
            raise UserError(f"{_ranks(missing)} of {world.size} did not start within {minutes:g} minutes")
        if now > told and world.rank == 0:
            LOG.info("waiting for %s of %d to start", _ranks(missing), world.size)
            told = now + 60
        time.sleep(0.1)
    everyone = [Identity(**json.loads(store.get(f"here/{rank}"))) for rank in range(world.size)]
    return Peers(world, everyone, store, on_gone)


def _store(world: World, minutes: float, look: Callable[[], None]) -> Any:
    """A connection to the key-value store at the meeting point.  torchrun's agent has one; else rank 0 makes it, in the
    way in which `torch.distributed` finds it again."""
    import torch.distributed as dist

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    makes = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    until, told = time.monotonic() + 60 * minutes, time.monotonic() + TOLD_AFTER_SECONDS
    while True:
        try:
            look()
            patience = timedelta(seconds=CONNECT_SECONDS)
            store = dist.TCPStore(host, port, None, makes, patience, wait_for_workers=False, multi_tenant=True)
            store.set_timeout(timedelta(seconds=SILENCE_SECONDS))  # a network that hiccups is no dead machine
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives the ranks
            return dist.PrefixStore(f"mirai_ds/peers/{attempt}", store)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            if makes:
                raise UserError(
                    f"rank 0 cannot listen at MASTER_ADDR {host}, MASTER_PORT {port} ({reason}); another job may use "
                    "that port: set MASTER_PORT to a free one"
                ) from None
            if time.monotonic() > until:
                raise UserError(f"rank 0 was not at {host}:{port} within {minutes:g} minutes ({reason})") from None
            if time.monotonic() > told:
                LOG.error("rank %d: waiting for rank 0 at %s:%d (%s)", world.rank, host, port, reason)
                told = time.monotonic() + 60


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (" ..." if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"
