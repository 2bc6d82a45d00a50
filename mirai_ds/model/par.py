"""PAR (parallel autoregressive generation, arXiv 2412.15119): regions, order of cells, slots and what they see.

The g x g grid is cut into s x s regions, n = s * s.  The first n tokens, one of each region, are made one by one; then
n at a time, one of each region.  In the input n - 1 learnable tokens follow the first n tokens:

    slot      0      1 .. n          n+1 .. 2n-1       2n ..
    holds     class  x_0 .. x_{n-1}  M_1 .. M_{n-1}    x_n ..        (x_q: the q-th token of the sequence)

Slot p predicts x_p.  Facts: YuqingWang1029/PAR (commit b1dd994).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirai_ds.model.order import CellOrder, Learnable, TokenOrder


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


class ParOrder(TokenOrder):
    """n tokens one by one, one of each region, then n at a time."""

    one_by_one = False

    def __init__(self, grid: int, par_tokens: int) -> None:
        """par_tokens: n, the number of regions, the square of a divisor of `grid`."""
        super().__init__(grid)
        self.n, self.regions = par_tokens, math.isqrt(par_tokens)
        self.side = grid // self.regions  # cells along a region's

    def learnable_tokens(self, dim: int) -> nn.Module:
        """M_1..M_{n-1}."""
        return LearnableTokens(self.n - 1, dim)

    def to_sequence(self, tokens: Tensor) -> Tensor:
        """By place in a region, then by region.  The last cell is the last of both orders, so that a sequence without
        it is one too; raises ValueError for any other length."""
        given = tokens.shape[1]
        if given not in (self.cells - 1, self.cells):
            raise ValueError(f"PAR takes all {self.cells} tokens or all but the last, not {given}")
        if given < self.cells:
            tokens = F.pad(tokens, (0, 0) * (tokens.ndim - 2) + (0, 1))
        split = tokens.unflatten(1, (self.regions, self.side, self.regions, self.side))
        return split.movedim((2, 4), (1, 2)).flatten(1, 4)[:, :given]

    def to_raster(self, x: Tensor) -> Tensor:
        """The inverse, of all N."""
        split = x.unflatten(1, (self.side, self.side, self.regions, self.regions))
        return split.movedim((1, 2), (2, 4)).flatten(1, 4)

    def arrange(self, x: Tensor, learnable: Learnable | None) -> Tensor:
        """The learnable tokens between the first n tokens and the rest."""
        assert learnable is not None
        return torch.cat([x[:, : 1 + self.n], learnable(len(x)), x[:, 1 + self.n :]], dim=1)

    def predictions(self, x: Tensor) -> Tensor:
        """The first N slots, back in raster order."""
        return self.to_raster(x[:, : self.cells])

    def rope(self, table: Tensor) -> Tensor:
        """(N + n, ...); learnable tokens have zeros.

        So their queries and keys are zero vectors, as the class's are: they attend alike to all that they see.
        """
        cells = self.to_sequence(table[None, 1:])
        x = torch.cat([table[None, :1], cells], dim=1)
        return self.arrange(x, lambda batch: cells.new_zeros(batch, self.n - 1, *cells.shape[2:]))[0]

    def mask(self) -> Tensor:
        """A slot sees those before it, itself, and from slot n on its whole block of n."""
        number = torch.arange(self.cells + self.n)
        block = number // self.n
        together = (block[:, None] == block[None, :]) & (block > 0)
        return (number[None, :] <= number[:, None]) | together

    def positions(self) -> CellOrder:
        """See `TokenOrder.positions`."""
        n, cells, raster = self.n, self.cells, torch.arange(self.cells, device="cpu")[None]
        return CellOrder(
            number=self.to_raster(raster)[0].tolist(),
            cell=self.to_sequence(raster)[0].tolist(),
            input_slot=[1 + q if q < n else n + q for q in range(cells)],
            seen_before=[q if q < n else q // n * n for q in range(cells)],
            seen_with=[1 + q if q < n else (1 + q // n) * n for q in range(cells)],
            slots=cells + n - 1,
        )

    def decoding_steps(self) -> Iterator[tuple[int, int]]:
        """n + (N - n) / n of them: 67 for 256 tokens and n = 4.

        The class; x_0..x_{n-2} one by one; x_{n-1} with the learnable tokens; then the n tokens just made, again and
        again.
        """
        yield from ((slot, 1) for slot in range(self.n))
        yield from ((slot, self.n) for slot in range(self.n, self.cells, self.n))

    def step_input(self, made: Tensor, start: int, embed: nn.Module, learnable: Learnable | None) -> Tensor:
        """The last token, with the learnable ones behind the n-th; then the last n tokens."""
        assert learnable is not None
        if start > self.n:
            return embed(made[:, -self.n :])
        x = embed(made[:, -1:])
        return x if start < self.n else torch.cat([x, learnable(len(x))], dim=1)
