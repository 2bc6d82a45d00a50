"""Random numbers as a function of a key: the output function of splitmix64 (Steele et al. 2014), in torch.

Nothing here has a state, so nothing has to be saved, and the numbers do not depend on torch's or NumPy's version.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB
_MASK = (1 << 63) - 1


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (x >> bits) & (_MASK >> (bits - 1))


def mix64(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 (wrapping arithmetic), shape and device of `x`."""
    x = (x ^ shift_right(x, 30)) * _MIX1
    x = (x ^ shift_right(x, 27)) * _MIX2
    return x ^ shift_right(x, 31)


def derive_keys(keys: Tensor, site: int | Tensor) -> Tensor:
    """Keys (...) int64 of one use (`site`) of randomness, from keys (...) int64; a tensor site is int64 beside them."""
    if not isinstance(site, Tensor):
        site = torch.full((), site, dtype=torch.int64, device=keys.device)
    return mix64(keys + mix64((site + 1) * GOLDEN))


def root_key(*numbers: int, device: torch.device | str = "cpu") -> Tensor:
    """A key () int64 from a tuple of integers, e.g. (seed, epoch)."""
    key = torch.zeros((), dtype=torch.int64, device=device)
    for number in numbers:
        key = derive_keys(key, number)
    return key


def to_unit(keys: Tensor) -> Tensor:
    """One number in [0, 1) of each key: (...) int64 -> (...) float32 (24 bits)."""
    return shift_right(keys, 40).to(torch.float32) * 2.0**-24


def uniform(keys: Tensor, site: int | Tensor) -> Tensor:
    """One number in [0, 1) per key and site: (B,) int64 -> (B,) float32 (24 bits)."""
    return to_unit(derive_keys(keys, site))
