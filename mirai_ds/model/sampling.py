"""Sampling with a static KV cache and classifier-free guidance, by LlamaGen's rules.

Every image has its own random numbers, a function of (seed, image index, step): the same image comes out of any batch
size and any number of ranks.
"""

from __future__ import annotations

from torch import Tensor

from mirai_ds.model.decoding import Decoder, Speed
from mirai_ds.model.gpt import GPT
from mirai_ds.model.rules import SamplingRules, draw, filter_logits, guide, image_keys, image_labels

__all__ = [
    "Decoder",
    "SamplingRules",
    "Speed",
    "draw",
    "filter_logits",
    "guide",
    "image_keys",
    "image_labels",
    "sample_tokens",
]


def sample_tokens(model: GPT, labels: Tensor, indices: Tensor, rules: SamplingRules, seed: int) -> Tensor:
    """Tokens (B, N) int64 in raster order for labels (B,) int64; `indices` (B,) int64 are the images' global numbers.

    Guidance runs the batch twice as wide (conditional rows first, then as many with the unconditional id), and only
    when cfg_scale > 1; the first token is always guided.  For many batches keep a `Decoder`.
    """
    return Decoder(model, labels.shape[0], rules).draw(labels, indices, seed)
