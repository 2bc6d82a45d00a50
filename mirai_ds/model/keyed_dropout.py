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


def drop_path(x: Tensor, rate: float, keys: Tensor | None) -> Tensor:
    """Stochastic depth: the whole residual branch of a sample x (B, ...) is dropped with probability `rate`."""
    if keys is None or rate == 0.0:
        return x
    keep = to_unit(keys) >= rate
    return (x * keep.view(-1, *[1] * (x.dim() - 1))) * (1.0 / (1.0 - rate))
