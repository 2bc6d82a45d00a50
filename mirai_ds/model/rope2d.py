"""LlamaGen's 2D rotary position table and its application."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(grid: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """(1 + grid^2, head_dim/2, 2) float32 of (cos, sin): class slot first, then cells in raster order.

    The first half of the pairs turns with the row, the second with the column.  The class slot's row is all zeros
    (cos = 0 *and* sin = 0), as in LlamaGen: its query and key become zero vectors.  An identity rotation there would
    break released checkpoints.  Built in fp32 throughout: an fp64 table moves logits by 1e-6.
    """
    half = head_dim // 2
    frequencies = 1.0 / (base ** (torch.arange(0, half, 2, dtype=torch.float32)[: half // 2] / half))
    angles = torch.outer(torch.arange(grid, dtype=torch.float32), frequencies)  # (grid, half/2)
    rows = angles[:, None, :].expand(grid, grid, -1)
    columns = angles[None, :, :].expand(grid, grid, -1)
    cells = torch.cat([rows, columns], dim=-1).reshape(grid * grid, half)
    table = torch.stack([cells.cos(), cells.sin()], dim=-1)
    return torch.cat([torch.zeros(1, half, 2), table])


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate adjacent channel pairs of x (B, S, heads, head_dim) by table (S, head_dim/2, 2), in fp32, cast back."""
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = table[:, None, :, 0], table[:, None, :, 1]
    a, b = pairs[..., 0], pairs[..., 1]
    rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return rotated.flatten(-2).to(x.dtype)
