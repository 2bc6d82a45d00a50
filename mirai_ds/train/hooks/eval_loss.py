"""Held-out next-token loss with raw and EMA weights, shared out over the ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from mirai_ds.config import Weights
from mirai_ds.model import next_token_loss
from mirai_ds.runtime.log import LOG
from mirai_ds.train.hooks.log import Sinks
from mirai_ds.train.loop import Hook
from mirai_ds.train.session import Session
from mirai_ds.train.step import StepRecord


@torch.inference_mode()
def held_out_loss(session: Session, kind: Weights) -> float:
    """Mean next-token loss (nats a token) over the held-out images, first stored view, no dropout.  Collective."""
    source, config = session.dataset.held_out, session.config.eval.loss
    count = min(len(source), config.max_samples or len(source))
    mine = torch.arange(session.world.rank, count, session.world.size)
    total = torch.zeros(2, dtype=torch.float64, device=session.device)
    with session.plain_gpt(kind) as gpt:
        for indices in mine.split(config.batch_size):
            session.beat("evaluating")
            tokens, labels, _ = source.gather(indices, torch.zeros_like(indices))
            tokens, labels = tokens.to(session.device), labels.to(session.device)
            loss = next_token_loss(gpt(tokens[:, :-1], labels).logits, tokens)
            total += torch.stack([loss.double() * len(indices), torch.tensor(float(len(indices)), device=total.device)])
    dist.all_reduce(total)
    return float(total[0] / total[1])


TOLD_AFTER = 3  # measurements above the lowest, after which the user is told


class EvalLossHook(Hook):
    """Writes held_out/ntp_raw and held_out/ntp_ema; numerics of training are not touched.

    A loss that has not fallen for some measurements is told, and with `eval.loss.patience` finishes the run.  It is
    judged by `checkpoint.best_metric`, so that the checkpoint kept as the best is that of the lowest.
    """

    def __init__(self, sinks: Sinks) -> None:
        self.sinks = sinks
        self.lowest, self.lowest_step, self.above = math.inf, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """The lowest loss so far, its step, and how many measurements since lay above it."""
        known = {"lowest": self.lowest, "lowest_step": self.lowest_step, "above": self.above}
        return known if math.isfinite(self.lowest) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Hook.load_state_dict`."""
        self.lowest, self.lowest_step = state.get("lowest", math.inf), state.get("lowest_step", 0)
        self.above = state.get("above", 0)

    def on_start(self, session: Session) -> None:
        """Measure the untrained model, so that a curve has its start; a run that was finished early stays so."""
        if session.step == 0 and session.config.eval.loss.every_steps:
            self._evaluate(session)
        self._finish_early(session)

    def needs_sync(self, session: Session) -> bool:
        """At the interval."""
        every = session.config.eval.loss.every_steps
        return every is not None and session.step % every == 0

    def after_step(self, session: Session, record: StepRecord) -> None:
        """Measure at the interval."""
        if self.needs_sync(session):
            self._evaluate(session)
            self._finish_early(session)

    def on_end(self, session: Session) -> None:
        """Measure the final weights unless that was just done."""
        known = all(f"held_out/ntp_{kind}" in session.progress.measured for kind in session.config.eval.loss.weights)
        if session.config.eval.loss.at_end and not known:  # a start that resumed at the end finds it in the checkpoint
            self._evaluate(session)

    def _evaluate(self, session: Session) -> None:
        if len(session.dataset.held_out) == 0:
            return  # a store is trained on whole unless the configuration says otherwise
        kinds = session.config.eval.loss.weights
        values = {f"held_out/ntp_{kind}": held_out_loss(session, kind) for kind in kinds}
        session.progress.measured |= values
        self.sinks.scalars(values, session)
        best = session.config.checkpoint.best_metric
        self._judge(values.get(best, next(iter(values.values()))), session)

    def _judge(self, loss: float, session: Session) -> None:
        if loss < self.lowest:
            self.lowest, self.lowest_step, self.above = loss, session.step, 0
            return
        self.above += 1
        if self.above == TOLD_AFTER:
            LOG.warning(
                "held-out loss: %.4f at step %d, and lowest, %.4f, at step %d: the run overfits, or has converged; "
                "checkpoint.keep_best: 1 keeps the best one, eval.loss.patience ends a run",
                loss, session.step, self.lowest, self.lowest_step,
            )  # fmt: skip

    def _finish_early(self, session: Session) -> None:
        """Every rank has the same losses, so all finish after the same step."""
        patience = session.config.eval.loss.patience
        if patience is not None and self.above >= patience and session.step < session.total_steps:
            session.early_end = session.step
            LOG.warning(
                "finishes after step %d: %d measurements above the held-out loss of step %d (eval.loss.patience)",
                session.step, self.above, self.lowest_step,
            )  # fmt: skip
