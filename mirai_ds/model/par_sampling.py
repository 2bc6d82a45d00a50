"""Sampling of PAR: n tokens one by one, then n at a time, with a static KV cache and guidance by LlamaGen's rules.

The q-th token of the sequence is drawn with the number of (seed, image index, q): an image comes out of any batch size
and any number of ranks alike, and tokens made at once are drawn independently of each other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mirai_ds.model.gpt import GPT, KVCache
from mirai_ds.model.par import to_raster
from mirai_ds.model.rules import SamplingRules, draw, filter_logits, guide, image_keys


def decoding_steps(cells: int, par_tokens: int) -> Iterator[tuple[int, int]]:
    """(first slot, slots) of each forward pass, n + (N - n) / n of them: 67 for 256 tokens and n = 4.

    The class; x_0..x_{n-2} one by one; x_{n-1} with the learnable tokens; then the n tokens just made, again and again.
    """
    yield from ((slot, 1) for slot in range(par_tokens))
    yield from ((slot, par_tokens) for slot in range(par_tokens, cells, par_tokens))


def decode_slots(model: GPT, x: Tensor, cache: list[KVCache], start: int) -> Tensor:
    """Logits (B, S, V) float32 of all of x (B, S, D), the embedded slots start..start+S-1, a whole step's."""
    stop = start + x.shape[1]
    assert model.mask is not None
    mask = model.mask[start:stop, :stop]
    for block, buffers in zip(model.layers, cache, strict=True):
        x = block(x, model.rope[start:stop], cache=buffers, start=start, mask=mask)
    return model.head(x)


def par_cache(model: GPT, batch: int) -> list[KVCache]:
    """Empty buffers for `batch` sequences of the N slots whose logits are tokens; the last n - 1 are never needed."""
    config, like = model.config, model.tok_embeddings.weight
    shape = (batch, config.heads, config.block_size, config.width // config.heads)
    return [KVCache(like.new_zeros(shape), like.new_zeros(shape)) for _ in model.layers]


def embed_step(model: GPT, made: Tensor, start: int) -> Tensor:
    """(B, S, D) for the slots from `start` on, given the tokens made so far (B, start) in sequence order."""
    n = model.config.par_tokens
    assert n is not None
    if start <= n:
        x = model.tok_embeddings(made[:, -1:])
        return x if start < n else torch.cat([x, model.spe_tok_embeddings(len(x))], dim=1)
    return model.tok_embeddings(made[:, -n:])


@torch.inference_mode()
def sample_par_tokens(model: GPT, labels: Tensor, indices: Tensor, rules: SamplingRules, seed: int) -> Tensor:
    """Tokens (B, N) int64 in raster order; arguments as in `sample_tokens`.

    A decoding step counts as one for `cfg_interval`, however many tokens it makes.
    """
    config, n = model.config, model.config.par_tokens
    assert n is not None
    guided, keys = rules.cfg_scale > 1.0, image_keys(seed, indices)
    both = torch.cat([labels, torch.full_like(labels, config.num_classes)]) if guided else labels
    cache = par_cache(model, both.shape[0])
    made = torch.empty(labels.shape[0], 0, dtype=torch.int64, device=labels.device)
    for step, (start, slots) in enumerate(decoding_steps(config.block_size, n)):
        if start == 0:
            x = model.cls_embedding(both, None)
        else:
            x = embed_step(model, made.repeat(2, 1) if guided else made, start)
        logits = decode_slots(model, x, cache, start)
        if guided:
            conditional, unconditional = logits.chunk(2)
            off = rules.cfg_interval > -1 and step - 1 > rules.cfg_interval  # counted from the second step
            logits = conditional if off else guide(conditional, unconditional, rules.cfg_scale)
        new = [draw(filter_logits(logits[:, i], rules), keys, start + i) for i in range(slots)]
        made = torch.cat([made, torch.stack(new, dim=1)], dim=1)
    return to_raster(made, n)
