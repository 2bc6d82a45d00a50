"""PAR (parallel autoregressive generation, arXiv 2412.15119): regions, order of cells, slots and what they see.

The g x g grid is cut into s x s regions, n = s * s.  The first n tokens, one of each region, are made one by one; then
n at a time, one of each region.  In the input n - 1 learnable tokens follow the first n tokens:

    slot      0      1 .. n          n+1 .. 2n-1       2n ..
    holds     class  x_0 .. x_{n-1}  M_1 .. M_{n-1}    x_n ..        (x_q: the q-th token of the sequence)

Slot p predicts x_p.  Facts: YuqingWang1029/PAR (commit b1dd994).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class LearnableTokens(nn.Module):
    """M_1..M_{n-1}, which stand in for the tokens of the step before at the first parallel step."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.special_embeddings = nn.Embedding(count, dim)

    def forward(self, batch: int) -> Tensor:
        """(batch, n - 1, D), the same for every sample."""
        table = self.special_embeddings
        numbers = torch.arange(table.num_embeddings, device=table.weight.device)
        return table(numbers).expand(batch, -1, -1)


def to_sequence(x: Tensor, par_tokens: int) -> Tensor:
    """(B, N, ...) in raster order -> the order of the sequence: by place in a region, then by region."""
    regions, side = _sides(x.shape[1], par_tokens)
    split = x.unflatten(1, (regions, side, regions, side))
    return split.movedim((2, 4), (1, 2)).flatten(1, 4)


def to_raster(x: Tensor, par_tokens: int) -> Tensor:
    """The inverse of `to_sequence`."""
    regions, side = _sides(x.shape[1], par_tokens)
    split = x.unflatten(1, (side, side, regions, regions))
    return split.movedim((1, 2), (2, 4)).flatten(1, 4)


def _sides(cells: int, par_tokens: int) -> tuple[int, int]:
    """Regions along the grid's side, and cells along a region's."""
    regions = math.isqrt(par_tokens)
    return regions, math.isqrt(cells) // regions


def arrange_slots(x: Tensor, middle: Tensor, par_tokens: int) -> Tensor:
    """(B, 1 + T, D) of the class and T tokens in sequence order, with the learnable `middle` (B, n - 1, D) put in."""
    return torch.cat([x[:, : 1 + par_tokens], middle, x[:, 1 + par_tokens :]], dim=1)


def par_rope(table: Tensor, par_tokens: int) -> Tensor:
    """(1 + N, ...) for the class and cells in raster order -> (N + n, ...) by slot; learnable tokens have zeros.

    So their queries and keys are zero vectors, as the class's are: they attend alike to all that they see.
    """
    cells = to_sequence(table[None, 1:], par_tokens)
    middle = cells.new_zeros(1, par_tokens - 1, *cells.shape[2:])
    return arrange_slots(torch.cat([table[None, :1], cells], dim=1), middle, par_tokens)[0]


def visible_slots(slots: int, par_tokens: int) -> Tensor:
    """(slots, slots) bool, True where a slot (row) sees another: those before it, itself, and from slot n on its
    whole block of n."""
    number = torch.arange(slots)
    block = number // par_tokens
    together = (block[:, None] == block[None, :]) & (block > 0)
    return (number[None, :] <= number[:, None]) | together


class CellOrder(NamedTuple):
    """Where the cells of a grid stand in the sequence of a model.  q counts tokens of the sequence from 0."""

    number: list[int]  # q of each cell, cells in raster order
    cell: list[int]  # raster number of the q-th token
    input_slot: list[int]  # slot that holds the q-th token; slot q predicts it
    seen_before: list[int]  # how many tokens, from the first on, the slot that predicts the q-th sees
    seen_with: list[int]  # how many the slot that holds it sees
    slots: int  # of the input in training, which has all tokens but the last


def cell_order(grid: int, par_tokens: int | None) -> CellOrder:
    """Of PAR, or of a plain model: raster order, a token a step."""
    cells = grid * grid
    if par_tokens is None:
        places = list(range(cells))
        after = list(range(1, cells + 1))
        return CellOrder(places, places, after, places, after, cells)
    n, raster = par_tokens, torch.arange(cells, device="cpu")[None]
    return CellOrder(
        number=to_raster(raster, n)[0].tolist(),
        cell=to_sequence(raster, n)[0].tolist(),
        input_slot=[1 + q if q < n else n + q for q in range(cells)],
        seen_before=[q if q < n else q // n * n for q in range(cells)],
        seen_with=[1 + q if q < n else (1 + q // n) * n for q in range(cells)],
        slots=cells + n - 1,
    )
