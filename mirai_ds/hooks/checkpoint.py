"""Saves at the interval and at the end."""

from __future__ import annotations

from mirai_ds.train.loop import Hook
from mirai_ds.train.session import Session
from mirai_ds.train.step import StepRecord


class CheckpointHook(Hook):
    """`checkpoint.every_steps`, `checkpoint.at_end`; a failed save stops the run with its cause."""

    def after_step(self, session: Session, record: StepRecord) -> None:
        """Save when it is time."""
        config = session.config.checkpoint
        due = config.every_steps is not None and session.step % config.every_steps == 0
        if due or (config.at_end and session.step == session.total_steps):
            session.save_checkpoint()
