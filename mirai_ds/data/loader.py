"""A rank's micro-batches of a step, cut from the global batch by position alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mirai_ds.data.order import DataOrder
from mirai_ds.data.sources import TokenSource


class Batch(NamedTuple):
    """tokens (B, N), labels (B,), keys (B,) int64 and images (B, 3, H, W) uint8 or None."""

    tokens: Tensor
    labels: Tensor
    keys: Tensor
    images: Tensor | None


class BatchLoader:
    """Micro-batch a of rank r holds positions (a * world + r) * micro ... of the global batch."""

    def __init__(
        self,
        source: TokenSource,
        order: DataOrder,
        micro: int,
        rank: int,
        world: int,
        device: torch.device,
        images: bool,
    ) -> None:
        self.source, self.order, self.micro, self.rank, self.world = source, order, micro, rank, world
        self.device, self.images = device, images
        self.accumulation, rest = divmod(order.global_batch_size, micro * world)
        if rest:
            raise ValueError(f"micro * world = {micro} * {world} does not divide {order.global_batch_size}")

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """The accumulation steps of global step `step` (0-based)."""
        for a in range(self.accumulation):
            start = (a * self.world + self.rank) * self.micro
            indices, keys = self.order.batch(step, start, start + self.micro)
            tokens, labels, images = self.source.gather(indices, self.order.views(keys, self.source.num_views))
            tokens, labels, keys = (t.to(self.device, non_blocking=True) for t in (tokens, labels, keys))
            yield Batch(tokens, labels, keys, images.to(self.device) if self.images and images is not None else None)
