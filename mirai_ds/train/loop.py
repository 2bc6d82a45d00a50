"""The loop.

For every step: `train_step`, then each hook's `after_step` in the order they were given.  Before the first step
`on_start`, after the last `on_end`.  New behaviour is a new hook; the loop does not grow.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from mirai_ds.train.session import Session
from mirai_ds.train.step import StepRecord, train_step


class Hook:
    """One behaviour around training.  Every rank calls every hook, so hooks may be collective."""

    def on_start(self, session: Session) -> None:
        """Before the first step of this process (also after a resume)."""

    def after_step(self, session: Session, record: StepRecord) -> None:
        """After each step; `session.step` is the number of finished steps."""

    def on_end(self, session: Session) -> None:
        """After the last step."""


def run_loop(session: Session, hooks: Sequence[Hook]) -> None:
    """Train from `session.step` to `session.total_steps`."""
    for hook in hooks:
        hook.on_start(session)
    while session.step < session.total_steps:
        record = train_step(session, session.step)
        session.step += 1
        session.applied_steps += int(record.applied)
        for hook in hooks:
            began = time.perf_counter()
            hook.after_step(session, record)
            session.hook_seconds += time.perf_counter() - began
    for hook in hooks:
        hook.on_end(session)
