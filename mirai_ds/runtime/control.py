"""What ranks tell each other about the run itself, on the CPU and beside training's own collectives."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Facts(NamedTuple):
    """What all ranks know at one step."""

    stop: int = 0  # the strongest request of any rank
    written: int = -1  # the newest step whose files every rank has written
    lost: bool = False  # some rank saw that the run was taken over


class Control:
    """A gloo group of its own.  `post` before a step, `arrived` after it: the exchange runs during the step and costs
    none of it, and every rank gets the same answer at the same step."""

    def __init__(self, timeout_minutes: float) -> None:
        self.group: Any = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
        self.facts = Facts()  # what all ranks said at the newest step
        self._work: Any = None
        self._flying = torch.empty(0)

    def post(self, mine: Facts) -> None:
        """Hands over this rank's facts; collective."""
        self._flying = torch.tensor([-mine.stop, mine.written, -int(mine.lost)], dtype=torch.int64)
        self._work = dist.all_reduce(self._flying, dist.ReduceOp.MIN, group=self.group, async_op=True)

    def arrived(self) -> Facts:
        """The facts that all ranks posted last."""
        self._work.wait()
        stop, written, lost = self._flying.tolist()
        self.facts = Facts(-stop, written, bool(lost))
        return self.facts

    def now(self, mine: Facts) -> Facts:
        """The facts that all ranks have at this moment; collective."""
        self.post(mine)
        return self.arrived()

    def gather(self, mine: T) -> list[T]:
        """The objects of all ranks in order of rank; collective."""
        everyone = [mine] * dist.get_world_size(self.group)
        dist.all_gather_object(everyone, mine, group=self.group)
        return everyone

    def barrier(self) -> None:
        """Waits for all ranks; collective."""
        dist.barrier(group=self.group)
