"""PAR once more, from the facts alone and in other words; built on `plain_gpt`, sharing nothing with `mirai_ds`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.model import plain_gpt as plain

LEARNABLE = "spe_tok_embeddings.special_embeddings.weight"


def walk(grid: int, n: int) -> list[tuple[int, int]]:
    """(row, column) of each token of the sequence: every place of a region, and there every region."""
    side = math.isqrt(n)
    width = grid // side
    return [
        (i + width * a, j + width * b) for i in range(width) for j in range(width) for a in range(side)
        for b in range(side)
    ]  # fmt: skip


def raster(grid: int, n: int) -> list[int]:
    """Raster number of each token of the sequence."""
    return [row * grid + column for row, column in walk(grid, n)]


def made_before(q: int, n: int) -> int:
    """How many tokens are there when the q-th is made."""
    return q if q < n else q // n * n


def shapes(config: dict[str, Any], ffn: int, n: int) -> dict[str, tuple[int, ...]]:
    """PAR's state dict: LlamaGen's and one tensor."""
    found = list(plain.shapes(config, ffn).items())
    return dict([*found[:2], (LEARNABLE, (n - 1, config["dim"])), *found[2:]])


def sees(slots: int, n: int) -> list[list[bool]]:
    """Whether slot p sees slot o, by writing down the blocks n..2n-1, 2n..3n-1, ..."""
    table = [[o <= p for o in range(slots)] for p in range(slots)]
    for first in range(n, slots, n):
        block = [p for p in range(first, first + n) if p < slots]
        for p in block:
            for o in block:
                table[p][o] = True
    return table


def forward(
    state: dict[str, Tensor], config: dict[str, Any], n: int, tokens: Tensor, labels: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """logits and the residual stream after every block, all slots.  tokens (B, T >= n) in sequence order."""
    grid = math.isqrt(config["block_size"])
    embedded = state["tok_embeddings.weight"][tokens]
    label = state["cls_embedding.embedding_table.weight"][labels][:, None]
    middle = state[LEARNABLE][None].expand(len(tokens), -1, -1)
    x = torch.cat([label, embedded[:, :n], middle, embedded[:, n:]], 1)
    turns = plain.turns(grid, config["dim"] // config["n_head"])
    cells = [turns[1 + cell] for cell in raster(grid, n)]
    nothing = torch.zeros_like(turns[0])
    table = torch.stack([nothing, *cells[:n], *[nothing] * (n - 1), *cells[n:]])[: x.shape[1]]
    mask = torch.where(torch.tensor(sees(x.shape[1], n)), 0.0, -math.inf).to(x.dtype)
    return plain.blocks(state, config, x, table, mask)
