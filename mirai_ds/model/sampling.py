"""Sampling with a static KV cache and classifier-free guidance, by LlamaGen's rules.

Every image has its own random numbers, a function of (seed, image index, step): the same image comes out of any batch
size and any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mirai_ds.model.gpt import GPT, KVCache
from mirai_ds.runtime.counter_random import mix64, root_key, uniform


@dataclass(frozen=True)
class SamplingRules:
    """cfg_interval -1: guide every step; else decode steps i > interval (from 0, after the first token) unguided."""

    cfg_scale: float = 1.0
    cfg_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """uncond + (cond - uncond) * scale on fp32 logits."""
    return unconditional + (conditional - unconditional) * scale


def filter_logits(logits: Tensor, rules: SamplingRules) -> Tensor:
    """Temperature (floor 1e-5), top-k (ties kept), top-p (the crossing token kept) on logits (B, V) float32."""
    logits = logits / max(rules.temperature, 1e-5)
    if rules.top_k > 0:
        kth = logits.topk(min(rules.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if rules.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass = ordered.softmax(-1).cumsum(-1)
        beyond = torch.zeros_like(mass, dtype=torch.bool)
        beyond[:, 1:] = mass[:, :-1] > rules.top_p
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    return logits


def draw(logits: Tensor, keys: Tensor, step: int) -> Tensor:
    """One token (B,) int64 per row of logits (B, V): inverse of the cumulative distribution at the image's number."""
    mass = logits.softmax(-1).double().cumsum(-1)
    u = uniform(keys, step).double()[:, None] * mass[:, -1:]
    return torch.searchsorted(mass, u, right=True).squeeze(1).clamp_(max=logits.shape[-1] - 1)


def image_keys(seed: int, indices: Tensor) -> Tensor:
    """Random keys (B,) int64 of images with global `indices` (B,) int64."""
    return mix64(root_key(seed, device=indices.device) + indices)


def new_cache(model: GPT, batch: int, dtype: torch.dtype) -> list[KVCache]:
    """Empty buffers for `batch` sequences of N slots: the class and x_1..x_{N-1} (x_N is never an input)."""
    config, device = model.config, model.rope.device
    shape = (batch, config.heads, config.block_size, config.width // config.heads)
    return [
        KVCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
        for _ in model.layers
    ]


def decode_step(model: GPT, x: Tensor, cache: list[KVCache], start: int) -> Tensor:
    """Logits (B, V) float32 of the last slot of x (B, S, D), the embedded slots start..start+S-1."""
    rope = model.rope[start : start + x.shape[1]]
    for block, buffers in zip(model.layers, cache, strict=True):
        x = block(x, rope, None, buffers, start)
    return model.head(x[:, -1:])[:, 0]


@torch.inference_mode()
def sample_tokens(model: GPT, labels: Tensor, indices: Tensor, rules: SamplingRules, seed: int) -> Tensor:
    """Tokens (B, N) int64 in raster order for labels (B,) int64; `indices` (B,) int64 are the images' global numbers.

    Guidance runs the batch twice as wide (conditional rows first, then as many with the unconditional id), and only
    when cfg_scale > 1; the first token is always guided.
    """
    if model.config.par_tokens is not None:
        from mirai_ds.model.par_sampling import sample_par_tokens  # which is built on this file

        return sample_par_tokens(model, labels, indices, rules, seed)
    config, batch = model.config, labels.shape[0]
    guided = rules.cfg_scale > 1.0
    keys = image_keys(seed, indices)
    both = torch.cat([labels, torch.full_like(labels, config.num_classes)]) if guided else labels
    cache = new_cache(model, both.shape[0], model.tok_embeddings.weight.dtype)
    tokens = torch.empty(batch, config.block_size, dtype=torch.int64, device=labels.device)
    x = model.cls_embedding(both, None)
    for position in range(config.block_size):
        logits = decode_step(model, x, cache, position)
        if guided:
            conditional, unconditional = logits.chunk(2)
            decode_index = position - 1
            off = rules.cfg_interval > -1 and decode_index > rules.cfg_interval
            logits = conditional if off else guide(conditional, unconditional, rules.cfg_scale)
        chosen = draw(filter_logits(logits, rules), keys, position)
        tokens[:, position] = chosen
        x = model.tok_embeddings(chosen.repeat(2) if guided else chosen)[:, None]
    return tokens
