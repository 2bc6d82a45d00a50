"""A loss far above the last ones: told, a reason to stop, or to go back and leave the batches out."""

from __future__ import annotations

import statistics
from typing import Any

from mirai_ds.checkpoint.store import list_steps
from mirai_ds.config import UserError
from mirai_ds.runtime.log import LOG
from mirai_ds.train.hooks.log import Sinks
from mirai_ds.train.loop import Hook
from mirai_ds.train.session import Session
from mirai_ds.train.step import StepRecord, mean_over_ranks

NORMAL = 1.4826  # standard deviations in a median absolute deviation of a normal distribution
FLOOR = 1e-3  # of the median: a plateau of equal losses has no deviation


def threshold(window: list[float], sigmas: float) -> float:
    """median + sigmas * 1.4826 * median absolute deviation, the deviation at least a thousandth of the median."""
    middle = statistics.median(window)
    spread = NORMAL * statistics.median(abs(value - middle) for value in window)
    return middle + sigmas * max(spread, FLOOR * abs(middle))


class SpikeHook(Hook):
    """`guard.spike`.  The losses it compares with are part of checkpoints, so a resumed run decides alike."""

    def __init__(self, sinks: Sinks) -> None:
        self.sinks = sinks
        self.window: list[float] = []
        self.rollbacks = 0

    def state_dict(self) -> dict[str, Any]:
        """The losses compared with, and how often the run went back."""
        return {"window": self.window, "rollbacks": self.rollbacks} if self.window or self.rollbacks else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Hook.load_state_dict`."""
        self.window, self.rollbacks = list(state.get("window", [])), int(state.get("rollbacks", 0))

    def needs_sync(self, session: Session) -> bool:
        """At each loss, unless it is off."""
        return session.config.guard.spike.action != "off"

    def after_step(self, session: Session, record: StepRecord) -> None:
        """Judge the global batch's next-token loss; a step without an update is the other guard's."""
        config = session.config.guard.spike
        if config.action == "off" or not record.applied:
            return
        loss = mean_over_ranks({"ntp": record.metrics["ntp"]})["ntp"][0]
        window = self.window
        if len(window) < config.window or loss <= threshold(window, config.sigmas):
            window.append(loss)
            del window[: -config.window]
            return
        limit = threshold(window, config.sigmas)
        what = f"step {session.step}: loss {loss:.4f} is above {limit:.4f}, {config.sigmas:g} sigmas of the last ones"
        self.sinks.scalars({"guard/spike": loss}, session)
        if config.action == "stop":
            raise UserError(f"{what}; stopped (guard.spike.action)")
        nowhere = config.action == "rollback" and session.control.gather(not list_steps(session.run))[0]
        if config.action == "warn" or nowhere:
            LOG.warning("%s%s", what, "; there is no checkpoint to go back to yet" * nowhere)
            return
        self._roll_back(session, what, self.rollbacks + 1)

    def _roll_back(self, session: Session, what: str, count: int) -> None:
        most = session.config.guard.spike.max_rollbacks
        if count > most:
            raise UserError(f"{what}; {most} rollbacks did not help (guard.spike.max_rollbacks)")
        session.beat("loading")
        step = session.checkpoints.roll_back(skip_batches=True)
        self.rollbacks = count  # what the checkpoint held is of before
        LOG.warning(
            "%s; back to step %d (rollback %d of %d), leaving out %d batches in all",
            what, step, count, most, session.progress.batch_offset,
        )  # fmt: skip
