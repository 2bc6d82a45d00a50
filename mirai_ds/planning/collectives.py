"""The collectives of one optimizer step, by ZeRO stage: bytes, calls, who takes part, what they can hide behind.

Read from DeepSpeed 0.19.8 and counted as it hands them to torch.distributed (`tests/engine/test_wire.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mirai_ds.planning.states import FLATTENED_AT_ONCE, StateMemory

Kind = Literal["all-reduce", "reduce", "reduce-scatter", "all-gather", "all-to-all"]
Window = Literal["forward", "backward", "nothing"]


@dataclass(frozen=True)
class Collective:
    """All calls of one sort in a step.

    size: bytes of the whole buffer, over all calls: what is reduced, or what everybody has after a gather.  ranks: of
    one group that takes part; span: whether these are all ranks, neighbours of one node, or peers on different nodes.
    rounds: how often a step goes through all of it (once a micro-batch, or once).
    """

    name: str
    kind: Kind
    size: float
    calls: float
    ranks: int
    span: Literal["all", "node", "nodes"] = "all"
    hides: Window = "nothing"
    rounds: int = 1

    @property
    def passes(self) -> int:
        """Times that every part goes round: an all-reduce is a reduce-scatter and an all-gather."""
        return 2 if self.kind == "all-reduce" else 1

    @property
    def sent(self) -> float:
        """Bytes one rank sends: of `ranks` parts all but its own travel."""
        return self.passes * self.size * (self.ranks - 1) / self.ranks


def collectives(states: StateMemory, teacher: float) -> list[Collective]:
    """teacher: bytes of Mirai-E's teacher, gathered from the average once a step.  Nothing is sent on one rank.  Left
    out: norms and flags (a few bytes each), and what a first step or a checkpoint sends."""
    if states.world == 1:
        return []
    sent = _stage3(states) if states.stage == 3 else _stages012(states)
    if teacher and states.stage:
        sent.append(Collective("teacher, all-gather", "all-gather", teacher, 2, states.world))
    return sent


def _buckets(states: StateMemory) -> int:
    return math.ceil(states.work.parameters / min(states.bucket, states.work.parameters))


def _stages012(states: StateMemory) -> list[Collective]:
    """Gradients in fp32.  Stages 1 and 2 all-reduce them too, unless `use_multi_rank_bucket_allreduce` is false: then
    each part is reduced to its owner alone, in smaller calls."""
    work, world = states.work, states.world
    rounds = states.accumulation if states.stage == 2 else 1
    at_end = states.stage == 0 or states.whole_bf16_gradients
    kind: Kind = "all-reduce" if at_end or states.all_reduces else "reduce"
    pieces = math.ceil(work.parameters / FLATTENED_AT_ONCE) if at_end else _buckets(states)
    if kind == "reduce":
        pieces += world  # a bucket is cut where another rank's part begins
    hides: Window = "backward" if states.overlaps else "nothing"
    gradients = Collective(
        f"gradients, {kind}", kind, rounds * 4.0 * work.parameters, rounds * pieces, world, hides=hides, rounds=rounds
    )
    if states.stage == 0:
        return [gradients]
    own = float(work.parameter * work.parameters)  # one call a parameter group, whatever allgather_bucket_size says
    return [gradients, Collective("parameters, all-gather", "all-gather", own, states.groups, world)]


def _stage3(states: StateMemory) -> list[Collective]:
    """Whole parameters are gathered as they are used, in calls of a matrix at least; those that were let go are
    gathered again on the way back, with hpZ from the node's own copy.  Small ones stay, and are gathered after the
    update."""
    work, world, rounds = states.work, states.world, states.accumulation
    number = 1.0 if states.quantized("weights") else float(work.parameter)
    cut = work.parameters - states.persistent
    again = states.gathered_again * cut
    forward = Collective(
        "parameters, all-gather", "all-gather", rounds * number * cut, rounds * states.matrices, world,
        hides="forward", rounds=rounds,
    )  # fmt: skip
    sent = [forward]
    if again:
        share = again / cut
        sent.append(Collective(
            "parameters again, all-gather", "all-gather", rounds * number * again, rounds * states.matrices * share,
            states.secondary or world, "node" if states.secondary else "all", "backward", rounds,
        ))  # fmt: skip
    sent += _stage3_gradients(states)
    if states.persistent:
        size = float(work.parameter * states.persistent)
        sent.append(Collective("small parameters, all-gather", "all-gather", size, 1, world))
    return sent


def _stage3_gradients(states: StateMemory) -> list[Collective]:
    work, world, rounds = states.work, states.world, states.accumulation
    hides: Window = "backward" if states.overlaps else "nothing"
    if not states.quantized("gradients"):
        size, calls = rounds * 4.0 * work.parameters, rounds * _buckets(states)
        return [
            Collective("gradients, reduce-scatter", "reduce-scatter", size, calls, world, hides=hides, rounds=rounds)
        ]
    # Four bits a number: first within the node, then what is left of it between nodes.
    gpus = min(states.gpus_a_node, world)
    half, calls = rounds * 0.5 * work.parameters, rounds * states.matrices
    near = Collective("gradients in the node, all-to-all", "all-to-all", half, calls, gpus, "node", hides, rounds)
    far = Collective(
        "gradients between nodes, all-to-all", "all-to-all", half / gpus, calls, world // gpus, "nodes", hides, rounds
    )
    return [c for c in (near, far) if c.ranks > 1]
