"""The loop.

For every step: `train_step`, then each hook's `after_step` in the order they were given.  Before the first step
`on_start`, after the last `on_end`.  New behaviour is a new hook; the loop does not grow.

The host runs ahead of the device and asks what became of the updates only after steps whose results a hook needs.
What it then finds out may be that an earlier update was refused: then it goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from mirai_ds.runtime.control import Facts
from mirai_ds.train.nonfinite import confirm_step
from mirai_ds.train.session import Session
from mirai_ds.train.step import StepRecord, train_step


class Hook:
    """One behaviour around training.  Every rank calls every hook, so hooks may be collective."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know of this hook, JSON-ready: part of checkpoints, under the hook's name."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` returned at the checkpoint that was resumed; empty where it held nothing.  Called before
        `on_start`, and again when a hook goes back to a checkpoint."""

    def check(self, session: Session) -> None:
        """After a resume and before the start is accepted: look at what a mistake of the user could spoil, and write
        nothing.  Raises UserError, on every rank."""

    def on_start(self, session: Session) -> None:
        """Before the first step of this process (also after a resume)."""

    def needs_sync(self, session: Session) -> bool:
        """Whether `after_step` will look at the record's tensors or the state, or keep them, after this step.  The same
        on every rank.  A hook that says no may be called again for the same step."""
        return True

    def after_step(self, session: Session, record: StepRecord) -> None:
        """After each step; `session.step` is the number of finished steps."""

    def on_rewind(self, session: Session) -> None:
        """After a hook went back to a checkpoint: `session.step` is its step now."""

    def on_end(self, session: Session) -> None:
        """After the last step; not when the run was asked to stop."""


def run_loop(session: Session, named: Mapping[str, Hook]) -> None:
    """Train from `session.step` to `session.total_steps`, or until a hook sets `session.ended`.

    named: hooks in the order in which they run, by the names under which checkpoints keep their state.
    """
    hooks = list(named.values())
    for name, hook in named.items():
        session.checkpoints.keep_state_of(name, hook)
    for hook in hooks:
        hook.on_start(session)
    while session.step < session.total_steps and session.ended is None:
        session.beat(f"step {session.step + 1}")
        session.control.post(Facts(session.stop.poll(), session.checkpoints.saver.written, session.run_lock.lost))
        record = train_step(session, session.step)
        session.count_step()
        session.progress.measured = {}
        session.control.arrived()
        if _wanted(session, hooks):
            done = session.step
            record = confirm_step(session, record)
            if session.step != done:
                continue
        rollbacks = session.checkpoints.rollbacks
        for hook in hooks:
            began = time.perf_counter()
            hook.after_step(session, record)
            session.hook_seconds += time.perf_counter() - began
            if session.checkpoints.rollbacks != rollbacks or session.ended is not None:
                break
        if session.checkpoints.rollbacks != rollbacks:
            session.graphs.forget()
            for hook in hooks:
                hook.on_rewind(session)
    if session.ended is None:
        session.checkpoints.saver.finish()
        for hook in hooks:
            session.beat(f"the end of the run, {type(hook).__name__}")
            hook.on_end(session)
        session.ended = ("finished", f"at step {session.step}")


def _wanted(session: Session, hooks: Sequence[Hook]) -> bool:
    last = session.step == session.total_steps
    return last or session.engine.update.offloaded or any(hook.needs_sync(session) for hook in hooks)
