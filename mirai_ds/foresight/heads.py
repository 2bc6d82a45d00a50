"""Heads from hidden states to what a teacher gives: REPA's MLP projector, or one transformer block (Table 9)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mirai_ds.config import ForesightConfig
from mirai_ds.config.foresight_config import HEAD_ATTENTION_HEADS


def projector(dim: int, hidden: int, target: int) -> nn.Sequential:
    """Linear, SiLU, Linear, SiLU, Linear, all biased; keys 0, 2, 4 as in the authors' checkpoints."""
    return nn.Sequential(
        nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, target)
    )


def projectors(count: int, dim: int, hidden: int, target: int) -> nn.ModuleList:
    """One MLP head an offset."""
    return nn.ModuleList(projector(dim, hidden, target) for _ in range(count))


class TransformerHead(nn.Module):
    """A pre-norm block (LayerNorm, 4-head attention, MLP of ratio 4 with GELU, all biased), then a linear layer.

    Attention has no positions of its own: the states carry them.  It is causal unless told otherwise, because the
    states are: a head that reads later slots finds the later tokens there and asks no foresight of the network.
    PyTorch's own nn.MultiheadAttention reads its output weight without calling the module that holds it, which ZeRO-3
    cannot see.
    """

    def __init__(self, dim: int, target: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.linear = nn.Linear(dim, target)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, C)."""
        batch, slots, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, slots, 3, HEAD_ATTENTION_HEADS, -1).transpose(1, 3).unbind(2)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, slots, dim))
        return self.linear(x + self.mlp(self.norm2(x)))


def heads(config: ForesightConfig, dim: int, target: int) -> nn.ModuleList:
    """One head an offset, from width `dim` to width `target`."""
    if config.head == "transformer":
        causal = config.head_attention == "causal"
        return nn.ModuleList(TransformerHead(dim, target, causal) for _ in range(config.heads))
    return projectors(config.heads, dim, config.projector_dim, target)
