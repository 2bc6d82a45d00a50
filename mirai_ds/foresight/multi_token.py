"""Foresight at the output (Mirai, Table 1): multi-token prediction.

One trunk, one head for each offset beyond the next token, one unembedding for all (Gloeckle et al. 2024,
arXiv 2404.19737).  The paper does not say what its heads are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mirai_ds.foresight.teachers import Teacher

_NONE = -100  # what cross-entropy leaves out


class TokenTeacher(Teacher):
    """What multi-token prediction learns from: the image's own tokens."""

    capturable = True

    def __init__(self, width: int) -> None:
        self.feature_dim = width  # heads map states to states: the network's norm and unembedding follow

    def features(self, tokens: Tensor, labels: Tensor, images: Tensor | None) -> Tensor:
        """tokens (B, N) as they are."""
        return tokens


def multi_token_loss(
    heads: Iterable[nn.Module],
    unembed: Callable[[Tensor], Tensor],
    states: Tensor,
    tokens: Tensor,
    index: Tensor,
    weights: Tensor,
    counts: Tensor,
    reduction: str = "sum",
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropies of later tokens.

    states (B, S, D); unembed: (B, S, D) -> logits (B, S, V) float32; tokens (B, N) int64.  index (S, K) integer: the
    token that slot s's head k predicts, -1 for none; weights (K,); counts (K,): what each head's sum is divided by.
    recompute: keep no head's logits for the backward pass (B * S * V numbers each) but compute them again.

    Returns (loss, entropies): scalar reduction_k weights_k * entropy_k, and entropies (K,), detached: mean over batch
    and counts_k slots, in nats.
    """

    def entropy(head: nn.Module, wanted: Tensor) -> Tensor:
        logits = unembed(head(states))
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=_NONE, reduction="sum")

    losses = []
    for k, head in enumerate(heads):
        rows = index[:, k].long()
        wanted = torch.where(rows < 0, _NONE, tokens[:, rows.clamp(min=0)])
        # PyTorch's non-reentrant kind, whatever the blocks use: the unembedding is shared, and ZeRO must see one
        # gradient of it, not one a head.
        total = (
            checkpoint(entropy, head, wanted, use_reentrant=False, preserve_rng_state=False)
            if recompute and torch.is_grad_enabled()
            else entropy(head, wanted)
        )
        losses.append(total / (counts[k] * len(tokens)))
    entropies = torch.stack(losses)
    weighted = weights * entropies
    return (weighted.sum() if reduction == "sum" else weighted.mean()), entropies.detach()
