"""Held-out next-token loss with raw and EMA weights, shared out over the ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from mirai_ds.config import Weights
from mirai_ds.model import next_token_loss
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


class EvalLossHook(Hook):
    """Writes held_out/ntp_raw and held_out/ntp_ema; numerics of training are not touched."""

    def __init__(self, sinks: Sinks) -> None:
        self.sinks = sinks

    def on_start(self, session: Session) -> None:
        """Measure the untrained model, so that a curve has its start."""
        if session.step == 0 and session.config.eval.loss.every_steps:
            self._evaluate(session)

    def needs_sync(self, session: Session) -> bool:
        """At the interval."""
        every = session.config.eval.loss.every_steps
        return every is not None and session.step % every == 0

    def after_step(self, session: Session, record: StepRecord) -> None:
        """Measure at the interval."""
        if self.needs_sync(session):
            self._evaluate(session)

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
