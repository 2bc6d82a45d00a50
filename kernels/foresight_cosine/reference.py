"""The alignment loss in plain PyTorch: what every fused version must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12  # F.normalize's clamp on the norm; a zero vector therefore has cosine 0 and gradient 0 through its norm


def foresight_cosine(
    projected: Tensor | Sequence[Tensor],
    target: Tensor,
    index: Tensor,
    weights: Tensor,
    counts: Tensor,
    reduction: str = "sum",
) -> tuple[Tensor, Tensor]:
    """Weighted negative cosine between projected states and gathered targets (Mirai, Eq. 10).

    projected: K tensors (B, S, C), or one (B, S, K, C); any floating dtype.
    target: (B, M, C), any floating dtype, no gradient.
    index: (S, K) integer; the row of `target` that slot s's head k looks at, -1 where there is none.
    weights: (K,) float, lambda of each head.
    counts: (K,) number of slots the head's sum is divided by (its valid slots, or all of them).
    reduction: `sum` over heads, or `mean` (1/K).

    Returns (loss, cosine): scalar float32 = reduction_k weights_k * -cosine_k, and cosine (K,) float32, detached:
    the sum of the head's cosines over its valid slots and the batch, divided by counts_k * B.
    All arithmetic is float32 (float64 for float64 inputs).  Slots without a target add nothing, even when their
    projection is not finite; a NaN in a slot that has a target makes the loss NaN.
    Raises ValueError on shapes that do not fit, IndexError on an index outside -1..M-1.
    """
    heads = list(projected.unbind(2)) if isinstance(projected, Tensor) else list(projected)
    _check(heads, target, index, weights, counts, reduction)
    wide = torch.promote_types(target.dtype, torch.float32)
    normed_target = F.normalize(target.detach().to(wide), dim=-1, eps=EPS)
    # How many slots have a target would be a question to the device (`nonzero`), for which the host waits: so all slots
    # are computed, those without a target from zeros.  `where` comes before the arithmetic, else the gradient of a
    # state that is not finite would be zero times infinity.
    valid = (index >= 0).T[:, None, :, None]
    rows = index.clamp(min=0).T.long()
    losses = []
    for k, states in enumerate(heads):
        normed = F.normalize(torch.where(valid[k], states, 0).to(wide), dim=-1, eps=EPS)
        gathered = torch.where(valid[k], normed_target[:, rows[k]], 0)
        losses.append(-(normed * gathered).sum() / (counts[k].to(wide) * states.shape[0]))
    per_head = torch.stack(losses)
    weighted = weights.to(wide) * per_head
    loss = weighted.sum() if reduction == "sum" else weighted.mean()
    return loss, -per_head.detach()


def _check(heads: list[Tensor], target: Tensor, index: Tensor, weights: Tensor, counts: Tensor, reduction: str) -> None:
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction = {reduction!r}: use 'sum' or 'mean'")
    batch, width = target.shape[0], target.shape[-1]
    for k, states in enumerate(heads):
        if states.shape != (batch, index.shape[0], width):
            raise ValueError(
                f"projected[{k}] has shape {tuple(states.shape)}, expected {(batch, index.shape[0], width)} "
                f"from target {tuple(target.shape)} and index {tuple(index.shape)}"
            )
    if index.shape[1] != len(heads) or weights.shape != (len(heads),) or counts.shape != (len(heads),):
        raise ValueError(
            f"{len(heads)} heads need index (S, {len(heads)}), weights and counts ({len(heads)},); got "
            f"{tuple(index.shape)}, {tuple(weights.shape)}, {tuple(counts.shape)}"
        )
    if index.device.type == "cpu":
        check_index(index, target.shape[1])


def check_index(index: Tensor, rows: int) -> None:
    """Raise IndexError where `index` has values outside -1..rows-1.  Waits for the device the index is on."""
    for value in (int(index.max()), int(index.min())):
        if not -1 <= value < rows:
            raise IndexError(f"index reaches {value}, target has {rows} rows (and -1 for none)")
