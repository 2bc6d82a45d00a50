"""Image grids from the training weights, drawn by all ranks together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mirai_ds.config import Weights
from mirai_ds.data.meaning import class_names
from mirai_ds.model import sample_tokens
from mirai_ds.model.rules import rules_of
from mirai_ds.tracking.pictures import labelled_grid, save_png
from mirai_ds.train.hooks.log import Sinks
from mirai_ds.train.loop import Hook
from mirai_ds.train.session import Session
from mirai_ds.train.step import StepRecord


def draw_samples(session: Session, labels: Tensor, kind: Weights, seed: int, batch: int = 256) -> Tensor:
    """Tokens (n, N) for labels (n,), the same on any number of ranks.  Collective."""
    mine = torch.arange(session.world.rank, len(labels), session.world.size)
    out = torch.zeros(len(labels), session.config.model.block_size, dtype=torch.int64, device=session.device)
    with session.plain_gpt(kind) as gpt:
        for indices in mine.split(batch):
            session.beat("sampling")
            indices = indices.to(session.device)
            chosen = labels.to(session.device)[indices]
            out[indices] = sample_tokens(gpt, chosen, indices, rules_of(session.config.sampling), seed)
    dist.all_reduce(out)
    return out.cpu()


class SampleHook(Hook):
    """A grid of `classes` rows with `per_class` images each, into samples/ and the trackers."""

    def __init__(self, sinks: Sinks) -> None:
        self.sinks = sinks
        self._done = -1

    def needs_sync(self, session: Session) -> bool:
        """At the interval."""
        every = session.config.sampling.every_steps
        return every is not None and session.step % every == 0

    def after_step(self, session: Session, record: StepRecord) -> None:
        """Draw at the interval."""
        if self.needs_sync(session):
            self._draw(session)

    def on_rewind(self, session: Session) -> None:
        """What was drawn later counts no more."""
        self._done = -1

    def on_end(self, session: Session) -> None:
        """Draw from the final weights unless that was just done."""
        if session.config.sampling.at_end and self._done != session.step:
            self._draw(session)

    def _draw(self, session: Session) -> None:
        self._done = session.step
        config, source = session.config.sampling, session.dataset.train
        if source.decoder is None:
            return  # tokens without a decoder cannot be shown
        labels = torch.arange(config.classes).repeat_interleave(config.per_class)
        tokens = draw_samples(session, labels, config.weights, session.config.seed)
        if not session.is_main:
            return
        names = class_names(source.meaning, range(config.classes))
        grid = labelled_grid(source.decode(tokens), config.per_class, rows=names)
        save_png(session.run / "samples" / f"step-{session.step:08d}.png", grid)
        self.sinks.image("samples/grid", grid, session)
