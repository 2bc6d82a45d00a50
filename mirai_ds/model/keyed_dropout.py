"""Dropout as a pure function of the sample, not of a rank's random stream.

A mask is a function of (sample key, site, element); here a key is already that of the site
(`counter_random.derive_keys`).  So dropout is the same on any number of ranks, for any
accumulation split and ZeRO stage, is replayed exactly by every recompute policy without saving random states, and is
the same after a resume.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mirai_ds.runtime.counter_random import GOLDEN, mix64, to_unit


def keep_mask(keys: Tensor, elements: int, rate: float) -> Tensor:
    """(B, elements) bool, True with probability 1 - round(rate * 2^16) / 2^16; four 16-bit draws a 64-bit hash."""
    lanes = -(-elements // 4)
    # `^ 0` changes nothing, but Inductor folds a bare arange times GOLDEN into an index expression, an int32 in its
    # Triton kernels, where 64-bit constants do not fit ("Scalar ... is out of range for type int32").
    counter = (torch.arange(1, lanes + 1, dtype=torch.int64, device=keys.device) ^ 0) * GOLDEN
    bits = mix64(keys[:, None] + counter).view(torch.int16)
    return bits[:, :elements] >= _threshold(rate) - 32768


def _threshold(rate: float) -> int:
    return round(rate * 65536)


def dropout(x: Tensor, rate: float, keys: Tensor | None) -> Tensor:
    """Inverted dropout of x (B, ...) by each sample's key; identity when `keys` is None or the rate is 0.

    `rate` is honoured to 2^-16 and survivors are scaled by the exact reciprocal, so the expectation is unbiased; also
    in bf16, where the scale must stay a Python number: rounded to bf16, 1/0.9 is 0.16% too small.
    """
    threshold = _threshold(rate)
    if keys is None or threshold == 0:
        return x
    mask = keep_mask(keys, x[0].numel(), rate).view(x.shape)
    return (x * mask) * (65536.0 / (65536 - threshold))


def path_scales(keys: Tensor, rates: Tensor) -> Tensor:
    """Stochastic depth's factor of each residual branch: 0 with its probability, else what keeps the expectation.

    keys (L, K, B) int64 of L blocks with K branches; rates (L, 2) int64 of `path_rates`.  Returns (L, K, B) float64.
    """
    rate, scale = rates.view(torch.float64)[..., None, None].unbind(1)
    return torch.where(to_unit(keys) >= rate.float(), scale, 0.0)


def path_rates(last: float, depth: int) -> Tensor:
    """Rate and survivors' scale, linear from 0 to `last` over the blocks: (depth, 2) int64, the bits of float64: a cast
    of the module to bf16 leaves them as they are."""
    rates = torch.tensor([last * index / max(1, depth - 1) for index in range(depth)], dtype=torch.float64)
    return torch.stack([rates, 1.0 / (1.0 - rates)], dim=1).view(torch.int64)


def drop_path(x: Tensor, scales: Tensor | None) -> Tensor:
    """Stochastic depth: the residual branch of each sample in x (B, ...) times its factor (B,), see `path_scales`."""
    if scales is None:
        return x
    wide = scales.to(torch.promote_types(x.dtype, torch.float32))
    return (x * wide.view(-1, *[1] * (x.dim() - 1))).to(x.dtype)
