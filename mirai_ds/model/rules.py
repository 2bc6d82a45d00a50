"""How tokens are chosen, by LlamaGen's rules: guidance, temperature, top-k, top-p, a draw without state; and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mirai_ds.config import SamplingConfig
from mirai_ds.runtime.counter_random import derive_keys, mix64, root_key, shift_right, uniform

Policy = Literal["random", "balanced"]
# A use of an image's key beyond every place of a token.
_LABEL_SITE = 1 << 32


@dataclass(frozen=True)
class SamplingRules:
    """cfg_interval -1: guide every step; else decode steps i > interval (from 0, after the first token) unguided."""

    cfg_scale: float = 1.0
    cfg_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def rules_of(config: SamplingConfig) -> SamplingRules:
    """The sampling rules that a configuration asks for."""
    return SamplingRules(config.cfg_scale, config.cfg_interval, config.temperature, config.top_k, config.top_p)


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
    """One token (B,) int64 per row of logits (B, V), of images with `keys` (B,) int64 at their place `step`."""
    return pick(logits, uniform(keys, step))


def pick(logits: Tensor, u: Tensor) -> Tensor:
    """Tokens (B,) int64: the inverse of the cumulative distribution of logits (B, V) at numbers u (B,) in [0, 1)."""
    mass = logits.softmax(-1).double().cumsum(-1)
    at = u.double()[:, None] * mass[:, -1:]
    return torch.searchsorted(mass, at, right=True).squeeze(1).clamp_(max=logits.shape[-1] - 1)


def image_keys(seed: int, indices: Tensor) -> Tensor:
    """Random keys (B,) int64 of images with global `indices` (B,) int64."""
    return mix64(root_key(seed, device=indices.device) + indices)


def image_labels(policy: Policy, classes: Sequence[int], seed: int, indices: Tensor) -> Tensor:
    """Labels (B,) int64 of images with global `indices` (B,) int64.

    random: uniform over `classes`, a function of (seed, index) alone, as LlamaGen's sampler draws (there from a rank's
    stream).  balanced: index i gets classes[i % len(classes)], so any first k images differ by one a class at most.
    """
    table = torch.tensor(list(classes), dtype=torch.int64, device=indices.device)
    if policy == "balanced":
        return table[indices % len(table)]
    number = shift_right(derive_keys(image_keys(seed, indices), _LABEL_SITE), 32)  # 32 bits
    return table[(number * len(table)) >> 32]
