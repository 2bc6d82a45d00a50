"""LlamaGen's class-conditional GPT: the same state-dict keys, numbers and traps; single-device maths only.

Facts: FoundationVision/LlamaGen, autoregressive/models/gpt.py (commit ce98ec4).  Slot 0 of a sequence is the class,
slot p >= 1 holds token x_p and predicts x_{p+1}.  Tokens go in and logits come out in raster order; how they lie in the
sequence in between is `model/order.py`'s, which is where PAR differs from LlamaGen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirai_ds.config import ModelConfig
from mirai_ds.kernels.linear_cross_entropy import linear_cross_entropy
from mirai_ds.model.keyed_dropout import drop_path, dropout, path_rates, path_scales
from mirai_ds.model.orders import token_order
from mirai_ds.model.rope2d import apply_rope, rope_table
from mirai_ds.runtime.counter_random import derive_keys, uniform

# Sites of randomness: 0 label, 1 tokens, then four a block (attention, feed-forward, and their drop paths).
_LABEL_SITE, _TOKEN_SITE, _BLOCK_SITE, _SITES_PER_BLOCK = 0, 1, 2, 4

BlockCall = Callable[[int, Callable[..., Tensor], tuple[Tensor | None, ...]], Tensor]


class KVCache(NamedTuple):
    """Static key and value buffers of one block, each (B, heads, slots, head_dim)."""

    key: Tensor
    value: Tensor

    def extend(self, key: Tensor, value: Tensor, position: Tensor, span: int) -> tuple[Tensor, Tensor]:
        """Write new ones (B', heads, S, head_dim), B' <= B, at slots `position` (S,) int64; all of the first `span`.

        The positions are a tensor, so that a captured step serves every position.
        """
        rows = len(key)
        keys, values = self.key[:rows], self.value[:rows]
        keys.index_copy_(2, position, key.to(keys.dtype))
        values.index_copy_(2, position, value.to(values.dtype))
        return keys[:, :, :span], values[:, :, :span]


class CachedSlots(NamedTuple):
    """Where the slots of a decoding step stand: the block's cache, their numbers (S,) int64, and how many of the
    cache's first slots are attended to."""

    cache: KVCache
    position: Tensor
    span: int


class GPTOutput(NamedTuple):
    """logits (B, S, V) float32; hidden: raw residual stream (B, S, D) after each tapped block (1-based)."""

    logits: Tensor
    hidden: dict[int, Tensor]


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) in fp32, cast to x's dtype, *then* times the weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Full multi-head causal attention; rows of wqkv are q, k, v, head-major inside each."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.heads
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None = None, cached: CachedSlots | None = None) -> Tensor:
        """x (B, S, D), rope (S, head_dim/2, 2) -> (B, S, D); with `cached`, x are slots among cached ones.

        mask (S, slots attended to) bool: who sees whom, instead of causal.
        """
        batch, slots, dim = x.shape
        q, k, v = self.wqkv(x).view(batch, slots, 3, self.n_head, -1).unbind(2)
        q, k = apply_rope(q, rope).transpose(1, 2), apply_rope(k, rope).transpose(1, 2)
        v = v.transpose(1, 2)
        if cached is not None:
            k, v = cached.cache.extend(k, v, cached.position, cached.span)
        # One new slot sees everything before it; several new slots without a mask only ever come first.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and slots > 1)
        return self.wo(out.transpose(1, 2).reshape(batch, slots, dim))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.width, config.ffn_hidden, bias=False)
        self.w3 = nn.Linear(config.width, config.ffn_hidden, bias=False)
        self.w2 = nn.Linear(config.ffn_hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Pre-norm transformer block with dropout after `wo` and after `w2` only (never on attention probabilities)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        # Set by the engine to keep or recompute the feed-forward half by itself; (function, argument) -> its output.
        self.run_feed_forward: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] | None = None
        # LlamaGen's scripts switch both off where stochastic depth is used.
        self.resid_rate = 0.0 if config.drop_path else config.resid_dropout
        self.ffn_rate = 0.0 if config.drop_path else config.ffn_dropout

    def forward(
        self, x: Tensor, rope: Tensor, keys: Tensor | None = None, paths: Tensor | None = None,
        mask: Tensor | None = None, cached: CachedSlots | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, S, D) -> (B, S, D); `keys` (4, B) int64, one for each use, turn dropout on; `paths` (2, B) float64 are
        both branches' factors of stochastic depth; the others are `Attention.forward`'s.

        Training and decoding both run this.  Nothing here depends on the block's number, so that one compiled graph
        serves all blocks.
        """
        key: tuple[Tensor | None, ...] = (None,) * _SITES_PER_BLOCK if keys is None else keys.unbind(0)
        a = dropout(self.attention(self.attention_norm(x), rope, mask, cached), self.resid_rate, key[0])
        h = x + drop_path(a, None if paths is None else paths[0])

        def feed_forward(h: Tensor) -> Tensor:
            return dropout(self.feed_forward(self.ffn_norm(h)), self.ffn_rate, key[1])

        f = feed_forward(h) if self.run_feed_forward is None else self.run_feed_forward(feed_forward, h)
        return h + drop_path(f, None if paths is None else paths[1])


class LabelEmbedding(nn.Module):
    """Table of num_classes + 1 rows; the last is the unconditional id."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.width)
        self.num_classes, self.rate = config.num_classes, config.class_dropout

    def forward(self, labels: Tensor, keys: Tensor | None) -> Tensor:
        """labels (B,) int64 -> (B, 1, D); with `keys` each label is dropped with probability `class_dropout`."""
        if keys is not None and self.rate > 0:
            labels = torch.where(uniform(keys, _LABEL_SITE) < self.rate, self.num_classes, labels)
        return self.embedding_table(labels)[:, None]


class GPTTrunk(nn.Module):
    """Embeddings and the first `n_blocks` blocks: all that a Mirai-E teacher needs."""

    rope: Tensor
    mask: Tensor | None
    sites: Tensor
    path_rates: Tensor | None

    def __init__(self, config: ModelConfig, n_blocks: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.cls_embedding = LabelEmbedding(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.order = token_order(config.grid, config.par_tokens)
        self.spe_tok_embeddings = self.order.learnable_tokens(config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(n_blocks or config.depth))
        for name, table in slot_tables(config).items():
            self.register_buffer(name, table, persistent=False)
        # Set by the engine to recompute activations; (index, block, arguments) -> block output.
        self.run_block: BlockCall | None = None

    def embed(self, tokens: Tensor, labels: Tensor, keys: Tensor | None) -> Tensor:
        """tokens (B, T) and labels (B,) int64 -> (B, S, D), S = 1 + T slots and the order's learnable ones."""
        label, sequence = self.cls_embedding(labels, keys), self.order.to_sequence(tokens)
        x = self.order.arrange(torch.cat([label, self.tok_embeddings(sequence)], dim=1), self.spe_tok_embeddings)
        return dropout(x, self.config.token_dropout, None if keys is None else derive_keys(keys, _TOKEN_SITE))

    def blocks(self, x: Tensor, keys: Tensor | None, tap: tuple[int, ...] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Run all blocks on x (B, S, D) by slot; also return the residual stream after the blocks in `tap`."""
        slots = x.shape[1]
        rope, hidden = self.rope[:slots], {}
        depth = len(self.layers)
        all_keys = None if keys is None else derive_keys(keys, self.sites[:depth])  # (L, 4, B)
        paths = None
        if all_keys is not None and self.path_rates is not None:
            paths = path_scales(all_keys[:, 2:], self.path_rates[:depth])
        for index, layer in enumerate(self.layers):
            block = layer if self.mask is None else partial(layer, mask=self.mask[:slots, :slots])
            given = (x, rope, None if all_keys is None else all_keys[index], None if paths is None else paths[index])
            x = block(*given) if self.run_block is None else self.run_block(index, block, given)
            if index + 1 in tap:
                hidden[index + 1] = x
        return x, hidden

    def features(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Residual stream (B, S, D), S as in `embed`, after the last block held, without dropout."""
        return self.blocks(self.embed(tokens, labels, None), None)[0]


class Unembedding(nn.Linear):
    """Logits, or with targets their mean cross-entropy without all logits: within the module, where ZeRO-3 gathers the
    weight."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """x (B, S, D) -> logits (B, S, V) in the products' dtype; with targets (B, S) int64 a scalar float32."""
        if targets is None:
            return F.linear(x, self.weight)
        return linear_cross_entropy(x.flatten(0, -2), self.weight, targets.flatten())


class GPT(GPTTrunk):
    """The whole network; `forward` gives next-token logits at every slot."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.output = Unembedding(config.width, config.vocab_size, bias=False)

    def head(self, x: Tensor) -> Tensor:
        """Residual stream (B, S, D) -> logits (B, S, V) float32."""
        return self.output(self.norm(x)).float()

    def forward(
        self, tokens: Tensor, labels: Tensor, keys: Tensor | None = None, tap: tuple[int, ...] = ()
    ) -> GPTOutput:
        """tokens (B, T) int64, T <= N - 1 in training; labels (B,) int64; keys (B,) int64 or None (no dropout).

        Returns logits (B, 1 + T, V) float32 and the hidden states after the blocks in `tap` (1-based).  PAR takes T =
        N - 1 or N tokens and returns logits (B, N, V).  Either way logits[:, c] are for the token of raster cell c.
        """
        x, hidden = self._trunk(tokens, labels, keys, tap)
        return GPTOutput(self.head(x), hidden)

    def loss(
        self, tokens: Tensor, labels: Tensor, keys: Tensor | None = None, tap: tuple[int, ...] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """`next_token_loss` of `forward` on tokens (B, N) without their last, a few rows of logits at a time; and the
        tapped hidden states."""
        x, hidden = self._trunk(tokens[:, :-1], labels, keys, tap)
        return self.output(self.norm(x), tokens), hidden

    def _trunk(
        self, tokens: Tensor, labels: Tensor, keys: Tensor | None, tap: tuple[int, ...]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The last block's output by raster cell, and what was tapped."""
        x, hidden = self.blocks(self.embed(tokens, labels, keys), keys, tap)
        return self.order.predictions(x), hidden


def slot_tables(config: ModelConfig) -> dict[str, Tensor | None]:
    """By slot: `rope` (slots, head_dim/2, 2) float32 and `mask`, None: causal; `sites` (L, 4, 1) int64, each block's of
    randomness; `path_rates`, None: no stochastic depth."""
    order = token_order(config.grid, config.par_tokens)
    sites = _BLOCK_SITE + torch.arange(config.depth * _SITES_PER_BLOCK)
    return {
        "rope": order.rope(rope_table(config.grid, config.width // config.heads, config.rope_base)),
        "mask": order.mask(),
        "sites": sites.view(-1, _SITES_PER_BLOCK, 1),
        "path_rates": path_rates(config.drop_path, config.depth) if config.drop_path else None,
    }


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy over all positions: logits (B, N, V), tokens (B, N) int64 -> scalar float32."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def gpt_from_weights(config: ModelConfig, weights: dict[str, Tensor]) -> GPT:
    """A frozen GPT in eval mode that owns `weights` (official keys); nothing is initialised or drawn on the way."""
    with torch.device("meta"):
        gpt = GPT(config)
    gpt.load_state_dict(weights, assign=True)
    device = gpt.norm.weight.device
    for name, table in slot_tables(config).items():
        setattr(gpt, name, None if table is None else table.to(device))
    return gpt.eval().requires_grad_(False)
