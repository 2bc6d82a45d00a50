"""Sampling by a model's own decoding steps, of one slot or of many, with a static KV cache and LlamaGen's guidance.

Any order of tokens is sampled by this; `model/decoding.py` is the fast way for orders of one slot a step.  The q-th
token of the sequence is drawn with the number of (seed, image index, q): an image comes out of any batch size and any
number of ranks alike, and tokens made at once are drawn independently of each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mirai_ds.model.gpt import GPT, CachedSlots, KVCache
from mirai_ds.model.rules import SamplingRules, draw, filter_logits, guide, image_keys


def new_cache(model: GPT, batch: int) -> list[KVCache]:
    """Empty buffers for `batch` sequences of the N slots whose logits are tokens; the last token is never an input."""
    config, like = model.config, model.tok_embeddings.weight
    shape = (batch, config.heads, config.block_size, config.width // config.heads)
    return [KVCache(like.new_zeros(shape), like.new_zeros(shape)) for _ in model.layers]


def decode_slots(model: GPT, x: Tensor, cache: list[KVCache], start: int) -> Tensor:
    """Logits (B, S, V) float32 of all of x (B, S, D), the embedded slots start..start+S-1."""
    stop = start + x.shape[1]
    mask = None if model.mask is None else model.mask[start:stop, :stop]
    position = torch.arange(start, stop, device=x.device)
    for block, buffers in zip(model.layers, cache, strict=True):
        x = block(x, model.rope[start:stop], mask=mask, cached=CachedSlots(buffers, position, stop))
    return model.head(x)


@torch.inference_mode()
def sample_stepwise(model: GPT, labels: Tensor, indices: Tensor, rules: SamplingRules, seed: int) -> Tensor:
    """Tokens (B, N) int64 in raster order; arguments as in `sample_tokens`.

    A decoding step counts as one for `cfg_interval`, however many tokens it makes.
    """
    guided, keys = rules.cfg_scale > 1.0, image_keys(seed, indices)
    both = torch.cat([labels, torch.full_like(labels, model.config.num_classes)]) if guided else labels
    cache = new_cache(model, both.shape[0])
    made = torch.empty(labels.shape[0], 0, dtype=torch.int64, device=labels.device)
    for step, (start, slots) in enumerate(model.order.decoding_steps()):
        if start == 0:
            x = model.cls_embedding(both, None)
        else:
            given = made.repeat(2, 1) if guided else made
            x = model.order.step_input(given, start, model.tok_embeddings, model.spe_tok_embeddings)
        logits = decode_slots(model, x, cache, start)
        if guided:
            conditional, unconditional = logits.chunk(2)
            off = rules.cfg_interval > -1 and step - 1 > rules.cfg_interval  # counted from the second step
            logits = conditional if off else guide(conditional, unconditional, rules.cfg_scale)
        new = [draw(filter_logits(logits[:, i], rules), keys, start + i) for i in range(slots)]
        made = torch.cat([made, torch.stack(new, dim=1)], dim=1)
    return model.order.to_raster(made)
