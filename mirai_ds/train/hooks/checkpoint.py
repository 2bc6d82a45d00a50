"""Saves at the interval and at the end; publishes what was written in the background."""

from __future__ import annotations

from mirai_ds.checkpoint.saver import SaveError
from mirai_ds.runtime.log import LOG
from mirai_ds.train.hooks.log import Sinks
from mirai_ds.train.loop import Hook
from mirai_ds.train.session import Session
from mirai_ds.train.step import StepRecord


class CheckpointHook(Hook):
    """`checkpoint.every_steps`, `keep_steps` and `at_end`.  A failed save stops the run with its cause, or is told and
    tried again at the next interval (`checkpoint.on_failure`); one in the background is heard of at the next step."""

    def __init__(self, sinks: Sinks) -> None:
        self.sinks = sinks

    def needs_sync(self, session: Session) -> bool:
        """At the interval; the loop looks at the last step anyway."""
        return session.config.checkpoint.due(session.step)

    def after_step(self, session: Session, record: StepRecord) -> None:
        """Publish what is complete, save when it is time."""
        config, saver = session.config.checkpoint, session.checkpoints.saver
        in_flight, stalled = saver.in_flight, saver.stall_seconds
        last = session.step == session.total_steps
        due = self.needs_sync(session)
        try:
            saver.poll(session.control.facts.written)
            if due or (config.at_end and last):
                session.save_checkpoint()
            if last:
                saver.finish()
        except SaveError as error:
            session.checkpoints.saved_step = -1
            if config.on_failure == "stop":
                raise
            LOG.warning("%s; trying again at the next one", error)
        if due or (in_flight >= 0 and saver.in_flight != in_flight):
            values = {"checkpoint/stall_s": saver.stall_seconds - stalled, "checkpoint/write_s": saver.write_seconds}
            self.sinks.machine(values, session)
