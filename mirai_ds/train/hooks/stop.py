"""Requests to stop: all ranks agree on one step, save, and leave."""

from __future__ import annotations

from mirai_ds.runs.lock import RunTakenOverError
from mirai_ds.runtime.control import Facts
from mirai_ds.runtime.signals import REQUEUE
from mirai_ds.train.hooks.log import Sinks
from mirai_ds.train.loop import Hook
from mirai_ds.train.session import Session
from mirai_ds.train.step import StepRecord


class StopHook(Hook):
    """Runs last: what the step was to bring is logged, measured and drawn before it is saved."""

    def __init__(self, sinks: Sinks) -> None:
        """It writes nothing itself."""

    def on_start(self, session: Session) -> None:
        """A request from the time of building; there is nothing new to save."""
        self._obey(session, session.control.now(Facts(session.stop.poll(), lost=session.run_lock.lost)))

    def needs_sync(self, session: Session) -> bool:
        """When it is time to save and leave."""
        return bool(session.control.facts.stop) or session.control.facts.lost

    def after_step(self, session: Session, record: StepRecord) -> None:
        """One step after the first rank was asked, which every rank learns at the same step."""
        self._obey(session, session.control.facts)

    def _obey(self, session: Session, facts: Facts) -> None:
        if facts.lost:
            session.run_lock.check()  # says by whom
            raise RunTakenOverError(f"{session.run}: was taken over by another start; nothing more is written")
        if not facts.stop:
            return
        session.stop.obeyed = True
        reason = next(filter(None, session.control.gather(session.stop.reason)), "asked to stop")
        if session.step < session.total_steps:
            if session.step > 0:
                session.save_checkpoint()
            session.checkpoints.saver.finish()
            verdict = "requeue" if facts.stop == REQUEUE else "stopped"
            session.ended = (verdict, f"{reason} at step {session.step}")  # type: ignore[assignment]
