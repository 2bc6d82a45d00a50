"""How many steps in a row were skipped because they were not finite: part of checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol


class Stateful(Protocol):
    """What keeps something from step to step that a resumed run must know."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready; empty when there is nothing to keep."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` returned at the checkpoint, or an empty one: then begin anew."""
        ...


@dataclass
class SkippedSteps:
    """in_a_row: of the newest ones; last: the newest, 0-based, -1 for none; states: whole states kept of them."""

    in_a_row: int = 0
    last: int = -1
    states: int = 0

    def add(self, step: int) -> None:
        """Count 0-based step `step`."""
        self.in_a_row = self.in_a_row + 1 if self.last == step - 1 else 1
        self.last = step

    def state_dict(self) -> dict[str, Any]:
        """See `Stateful`."""
        return asdict(self) if self.last >= 0 else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Stateful`."""
        self.in_a_row, self.last = int(state.get("in_a_row", 0)), int(state.get("last", -1))
        self.states = int(state.get("states", 0))
