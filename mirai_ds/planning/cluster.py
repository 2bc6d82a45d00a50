"""Seconds of collectives on nodes of GPUs, and of a step in which part of them hides behind computation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mirai_ds.planning.collectives import Collective
from mirai_ds.planning.devices import LINK_EFFICIENCY, Device


class Protocol(NamedTuple):
    """What a call of NCCL costs beside its bytes, in seconds: its start, and a hop over NVLink and over a network, of a
    ring and of a tree; share: of the wire that carries data."""

    start: float
    ring: tuple[float, float]
    tree: tuple[float, float]
    share: float


# NCCL's own tuning tables (src/graph/tuning.cc); it takes whichever is faster for a call's size.
PROTOCOLS = {
    "Simple": Protocol(8.4e-6, (3.4e-6, 14e-6), (4.0e-6, 14e-6), 1.0),
    "LL128": Protocol(14e-6, (1.9e-6, 4.0e-6), (1.25e-6, 8.5e-6), 120 / 128),
}
PCIE_HOP = 5.7e-6  # Simple; LL128 needs NVLink
_SLOWEST_NVLINK = 100e9  # bytes/s: a slower link is PCIe


@dataclass(frozen=True)
class ClusterShape:
    """`nodes` machines of `gpus` devices."""

    device: Device
    nodes: int
    gpus: int

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.nodes * self.gpus

    @property
    def known(self) -> bool:
        """Whether the speed of its links is known."""
        return self.device.link > 0

    def bandwidth(self, span: str = "all") -> float:
        """Bytes/s that a rank sends in a ring: the link within a node; across nodes no faster than all ports of the
        node together, through which NCCL's rings, one a port, carry each byte once; between peers one port."""
        within = self.device.link if self.gpus > 1 else math.inf
        across = self.device.network * self.gpus if self.nodes > 1 else math.inf
        return LINK_EFFICIENCY * {"node": within, "nodes": self.device.network}.get(span, min(within, across))

    def seconds(self, c: Collective) -> float:
        """Seconds of all calls one after the other, each by the faster protocol."""
        wire = self.bandwidth(c.span)
        bytes_ = 0.0 if math.isinf(wire) else c.sent / wire
        nvlink = self.device.link >= _SLOWEST_NVLINK
        usable = PROTOCOLS.values() if nvlink else [PROTOCOLS["Simple"]]
        return min(c.calls * self._latency(c, p, nvlink) + bytes_ / p.share for p in usable)

    def _latency(self, c: Collective, p: Protocol, nvlink: bool) -> float:
        """One call: the hops of its ring or, for an all-reduce, of a tree where that is less."""
        nodes = {"node": 1, "nodes": c.ranks}.get(c.span, self.nodes)
        gpus = c.ranks // nodes
        near, tree_near = (p.ring[0], p.tree[0]) if nvlink else (PCIE_HOP, PCIE_HOP)
        if c.kind == "all-to-all":
            return p.start + (p.ring[1] if nodes > 1 else near)
        far = nodes if nodes > 1 else 0
        hops = c.passes * ((max(0, c.ranks - 1 - far) if gpus > 1 else 0) * near + far * p.ring[1])
        tree = 2 * ((gpus - 1) * tree_near + math.log2(nodes) * p.tree[1])
        return p.start + (min(hops, tree) if c.kind == "all-reduce" else hops)

    def over_links(self, c: Collective) -> float:
        """Bytes a rank sends to GPUs of its own node."""
        if c.span == "nodes" or self.gpus == 1:
            return 0.0
        inside = 1.0 if c.span == "node" or self.nodes == 1 else (self.gpus - 1) / self.gpus
        return c.sent * inside

    def over_network(self, c: Collective) -> float:
        """Bytes that leave a node."""
        if self.nodes == 1 or c.span == "node":
            return 0.0
        return c.sent * (self.gpus if c.span == "nodes" else 1)


@dataclass(frozen=True)
class Compute:
    """Seconds of one rank's matrix products in a step.  before: teacher and encoder, behind which nothing is sent.
    blocks: in how many pieces forward and backward pass run; accumulation: micro-batches."""

    before: float
    forward: float
    backward: float
    blocks: int
    accumulation: int

    @property
    def total(self) -> float:
        """Seconds of the whole computation."""
        return self.before + self.forward + self.backward


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step: of matrix products, of collectives by themselves, and how much of these hides."""

    compute: float
    communication: float
    hidden: float = 0.0

    @property
    def expected(self) -> float:
        """Seconds of a step when all communication that can be hidden is."""
        return self.compute + self.communication - self.hidden

    @property
    def overlapped(self) -> float:
        """Seconds of a step when all communication hides behind computation."""
        return max(self.compute, self.communication)

    @property
    def exposed(self) -> float:
        """Seconds of a step when no communication hides."""
        return self.compute + self.communication


def left_over(window: float, sent: float, pieces: float) -> float:
    """Seconds of communication that `window` seconds of computation do not cover, both in `pieces`: the first piece is
    computed before anything is sent, the last is sent when nothing is left to compute."""
    pieces = max(1.0, pieces)
    return max(window + sent / pieces, window / pieces + sent) - window


def step_time(cluster: ClusterShape, sent: Sequence[Collective], compute: Compute) -> StepTime:
    """Gradients hide behind the backward pass that makes them, ZeRO-3's gathers behind the blocks before; the gathers
    after the update and the teacher's behind nothing."""
    times = {c: cluster.seconds(c) for c in sent}
    whole = sum(times.values())
    open_ = sum(t for c, t in times.items() if c.hides == "nothing")
    for name, seconds in (("forward", compute.forward), ("backward", compute.backward)):
        those = [c for c in sent if c.hides == name]
        if not those:
            continue
        rounds = max(c.rounds for c in those)
        pieces = min(min(c.calls / c.rounds, compute.blocks) for c in those)
        open_ += rounds * left_over(seconds / compute.accumulation, sum(times[c] for c in those) / rounds, pieces)
    return StepTime(compute.total, whole, whole - open_)
