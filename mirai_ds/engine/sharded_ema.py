"""The fp32 average of the fp32 master weights, sharded like the optimizer state, and gathers of sharded values.

An average kept in bf16 would not move: at decay 0.9999 an update is 1e-4 of the difference, below half an ulp.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from mirai_ds.engine.gloo import gather_parts
from mirai_ds.engine.layout import Shard, StateLayout


@torch.no_grad()
def gather(
    shards: list[Shard],
    values: list[Tensor],
    dtype: torch.dtype,
    device: torch.device,
    names: Collection[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole tensor in `dtype` on `device`) of values laid out like the masters, on every rank.

    One all_gather for each shard that holds a wanted name; every rank must ask for the same names.
    """
    for shard, value in zip(shards, values, strict=True):
        if names is not None and not any(p.name in names for p in shard.parameters):
            continue
        local = value.detach().flatten().to(device=device, dtype=dtype).contiguous()
        if shard.world > 1:
            everyone = torch.empty(shard.world * local.numel(), dtype=dtype, device=device)
            if device.type == "cpu":
                everyone.view(shard.world, -1)[shard.rank].copy_(local)
                gather_parts(everyone.view(shard.world, -1).unbind(), shard.group)
            else:
                dist.all_gather_into_tensor(everyone, local, group=shard.group)
        else:
            everyone = local
        rows = everyone.view(shard.world, -1)
        parts: dict[str, list[Tensor]] = {}
        for rank in range(shard.world):
            for piece in shard.pieces(rank):
                if names is None or piece.name in names:
                    parts.setdefault(piece.name, []).append(rows[rank, piece.local : piece.local + piece.length])
        for parameter in shard.parameters:
            if parameter.name in parts:
                flat = parts[parameter.name]
                whole = flat[0] if len(flat) == 1 else torch.cat(flat)
                assert whole.numel() == math.prod(parameter.shape)
                yield parameter.name, whole.view(parameter.shape)


class ShardedEma:
    """ema <- decay * ema + (1 - decay) * master, after every applied optimizer step; starts as a copy."""

    def __init__(self, layout: StateLayout, decay: float) -> None:
        self.layout, self.decay = layout, decay
        self.values = [master.clone() for master in layout.masters]
        self.version = 0  # counts changes, so that a teacher knows when it is stale

    @torch.no_grad()
    def update(self, refused: Tensor) -> None:
        """One step of the average, on this rank's shards only; none where `refused`, () float32, is one."""
        weights = (1.0 - self.decay) * (1.0 - refused)
        for value, master in zip(self.values, self.layout.masters, strict=True):
            value.lerp_(master, weights.to(value.device))
        self.version += 1

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the masters (after foreign weights were loaded)."""
        torch._foreach_copy_(self.values, self.layout.masters)
        self.version += 1
