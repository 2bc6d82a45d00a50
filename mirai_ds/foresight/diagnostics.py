"""What the two losses do to the network where they meet, and how alike features are beyond what all of them share.

Everything stays on the device: the host reads it when metrics are logged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Keep(torch.autograd.Function):
    """The same tensor, whose gradient is also left in a list."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, kept: list[Tensor]) -> Tensor:
        ctx.kept = kept
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.kept.append(gradient)
        return gradient, None


class TapGradients:
    """Measures the gradients of the next-token and of the alignment loss with respect to the tapped states.

    sums: (3,) float32: squared norm of the first, of the second, their dot product, summed over the backward passes
    since `clear`; each is of a micro-batch's mean loss, divided by the accumulation as the engine does.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def watch(self, states: Tensor, detached: bool) -> Tensor:
        """States (B, S, D) of a forward pass -> the same for the heads.  Call it when all else that uses them is
        computed: autograd adds up in reverse, and whatever the order, it must be that of an unwatched pass."""
        if self.sums is None or self.sums.device != states.device:
            self.sums = torch.zeros(3, device=states.device)
        kept: list[Tensor] = []
        if states.requires_grad:
            states.register_hook(lambda total: self._measure(total, kept))
        if detached or not states.requires_grad:
            return states.detach() if detached else states
        watched: Tensor = _Keep.apply(states, kept)
        return watched

    def _measure(self, total: Tensor, kept: list[Tensor]) -> None:
        """The next-token loss's gradient is what remains of the sum."""
        assert self.sums is not None
        aligned = kept[0].float().flatten() if kept else torch.zeros_like(total).float().flatten()
        onward = total.float().flatten() - aligned
        self.sums.add_(torch.stack([onward.dot(onward), aligned.dot(aligned), onward.dot(aligned)]))
        kept.clear()

    def clear(self) -> None:
        """Before a step's first forward pass."""
        if self.sums is not None:
            self.sums.zero_()


@torch.no_grad()
def centred_cosines(projected: Sequence[Tensor], target: Tensor, index: Tensor) -> Tensor:
    """(K,) float32: each head's mean cosine after the mean direction is subtracted on both sides.

    projected: K of (B, S, C); target (B, M, C); index (S, K), -1 for none.  Vectors are scaled to unit length first,
    since the length of a projection is arbitrary; the means are over the batch and the head's slots.  Features that
    share one direction have high cosines whatever a head has learned: these are 0 for a head that gives that direction.
    """
    unit = F.normalize(target.float(), dim=-1)
    cosines = []
    for k, states in enumerate(projected):
        valid = (index[:, k] >= 0).float()[:, None]
        count = valid.sum() * states.shape[0]
        ours = F.normalize(states.float(), dim=-1) * valid
        theirs = unit[:, index[:, k].clamp(min=0).long()] * valid
        ours, theirs = (side - side.sum((0, 1)) / count for side in (ours, theirs))
        cosines.append((F.cosine_similarity(ours, theirs, dim=-1) * valid[:, 0]).sum() / count)
    return torch.stack(cosines)
