"""Which later token each head looks at: offsets, borders and slots, for any grid (Mirai, Eq. 8).

A head means one offset.  Everything that differs between the authors' code and the paper's text ends as one table
`index` (slots, heads) into the teacher's features, -1 where a slot has no target.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mirai_ds.config import ConfigError, ForesightConfig

# The authors' order of heads (flat shifts 0, +1, +16, +17, +2, +18, +34, +33, +32 on a 16 grid).
OFFICIAL_OFFSETS = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0))
# The down-right quadrant by (dr^2 + dc^2, dr, dc): the only reading of Eq. 8 without ties at K = 1, 3, 4, 9.
NEAREST_OFFSETS = tuple(sorted(OFFICIAL_OFFSETS, key=lambda o: (o[0] ** 2 + o[1] ** 2, *o)))


def offsets(config: ForesightConfig) -> list[tuple[int, int]]:
    """(rows down, columns right) of each head, the config's own if given; in 1d layout (0, k): k tokens later.

    Of mtp without (0, 0), the next token, which needs no head.
    """
    if config.offsets is not None:
        return [(down, right) for down, right in config.offsets]
    first = int(config.method == "mtp")
    if config.layout == "1d":
        return [(0, k) for k in range(first, first + config.heads)]
    order = OFFICIAL_OFFSETS if config.head_order == "official" else NEAREST_OFFSETS
    return list(order[first : first + config.heads])


def target_cell(cell: int, offset: tuple[int, int], grid: int, config: ForesightConfig) -> int:
    """Raster number of the cell at `offset` from `cell`, or -1 where the border rule gives none."""
    down, right = offset
    if config.layout == "1d" or config.border == "wrap":
        stride = config.flat_stride or grid
        found = cell + down * stride + right
        return found if found < grid * grid else -1
    row, column = cell // grid + down, cell % grid + right
    if config.border == "clamp":
        row, column = min(row, grid - 1), min(column, grid - 1)
    return row * grid + column if row < grid and column < grid else -1


def index_table(config: ForesightConfig, grid: int) -> Tensor:
    """(S, K) int64 on CPU for S = N student slots (class and x_1..x_{N-1}), N = grid^2.

    Mirai-E's rows of the target are the teacher's slots (0 = class); Mirai-I's are the encoder's patches and mtp's the
    tokens, in raster order, all N of them.  Raises ConfigError when a head has no target (the class slot is none) on
    this grid.
    """
    cells = grid * grid
    by_cell = config.method != "mirai-e"
    # Cells whose features the teacher has: all patches or tokens, or the tokens it was given.
    available = cells if by_cell or config.teacher_sees_last_token else cells - 1
    table = torch.full((cells, config.heads), -1, dtype=torch.int64, device="cpu")
    for k, offset in enumerate(offsets(config)):
        for slot in range(cells):
            cell = slot - 1 if config.slots == "input" else slot
            if cell < 0:
                continue
            found = target_cell(cell, offset, grid, config)
            if 0 <= found < available:
                table[slot, k] = found if by_cell else found + 1
    empty = [k for k in range(config.heads) if bool((table[:, k] < 0).all())]
    if empty and config.offsets is not None:
        problem = f"head {empty[0] + 1} has no target on a {grid}x{grid} grid; remove {config.offsets[empty[0]]}"
        raise ConfigError("foresight.offsets", config.offsets, problem)
    if empty:
        problem = f"head {empty[0] + 1} has no target on a {grid}x{grid} grid; lower it"
        raise ConfigError("foresight.num_heads", config.heads, problem)
    if config.class_slot:
        table[0] = 0
    return table


def slot_counts(config: ForesightConfig, table: Tensor) -> Tensor:
    """(K,) float32: what each head's sum is divided by, its valid slots or (normalizer: constant) all N."""
    if config.normalizer == "constant":
        return torch.full((table.shape[1],), float(table.shape[0]))
    return (table >= 0).sum(0).float()
