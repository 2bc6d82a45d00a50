"""Which later token each head looks at: offsets, borders and slots, for any grid (Mirai, Eq. 8).

A head means one offset.  Everything that differs between the authors' code and the paper's text ends as one table
`index` (slots, heads) into the teacher's features, -1 where a slot has no target.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mirai_ds.config import ConfigError, ForesightConfig, ModelConfig
from mirai_ds.foresight.neighbour_layouts import layout_of
from mirai_ds.model.orders import token_order


def offsets(config: ForesightConfig) -> list[tuple[int, int]]:
    """(rows down, columns right) of each head, as the layout means them."""
    return layout_of(config).offsets(config)


class Pair(NamedTuple):
    """A student's slot, a head, the row of the target that the head looks at from there, and whether the slot has seen
    the target's token already, so that nothing is foreseen (its own cell aside)."""

    slot: int
    head: int
    row: int
    decoded: bool


def pairs(config: ForesightConfig, grid: int, par_tokens: int | None = None) -> Iterator[Pair]:
    """All of them but the class's.  Neighbours are the layout's, whatever the order of the sequence; only the slots
    that stand for them follow it."""
    order, by_cell, layout = token_order(grid, par_tokens).positions(), config.targets_by_cell, layout_of(config)
    cells = grid * grid
    # Tokens whose features the teacher has: all patches or tokens, or the tokens it was given.
    available = cells if by_cell or config.teacher_sees_last_token else cells - 1
    seen = order.seen_with if config.slots == "input" else order.seen_before
    for head, offset in enumerate(layout.offsets(config)):
        for number in range(cells):
            slot = order.input_slot[number] if config.slots == "input" else number
            if slot >= order.slots:  # the last token is no input
                continue
            target = layout.target(config, order, number, offset)
            if target is not None and target < available:
                row = order.cell[target] if by_cell else order.input_slot[target]
                yield Pair(slot, head, row, target < seen[number] and target != number)


def index_table(config: ForesightConfig, grid: int, par_tokens: int | None = None) -> Tensor:
    """(S, K) int64 on CPU for the S student slots: the class and all tokens but the last, S = N = grid^2.

    PAR: S = N + n - 1.  Its learnable tokens stand for no cell with `slots: input`, and predict one with `predict`.

    Mirai-E's rows of the target are the teacher's slots (0 = class); Mirai-I's are the encoder's patches and mtp's the
    tokens, in raster order, all N of them.  Raises ConfigError when a head has no target (the class slot is none) on
    this grid.
    """
    slots = token_order(grid, par_tokens).positions().slots
    table = torch.full((slots, config.heads), -1, dtype=torch.int64, device="cpu")
    for slot, head, row, decoded in pairs(config, grid, par_tokens):
        if not (decoded and config.mask_decoded_targets):
            table[slot, head] = row
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


def slot_counts(config: ForesightConfig, table: Tensor, cells: int | None = None) -> Tensor:
    """(K,) float32: what each head's sum is divided by, its valid slots or (normalizer: constant) all N `cells`; by
    default as many as the table has slots, which PAR has more of."""
    if config.normalizer == "constant":
        return torch.full((table.shape[1],), float(cells or table.shape[0]))
    return (table >= 0).sum(0).float()


def decoded_targets(config: ForesightConfig, grid: int, par_tokens: int | None = None) -> list[tuple[int, int]]:
    """(pairs whose target the slot has seen already, all pairs) of each head, before `mask_decoded_targets`.

    Raster order has none.  PAR's regions have seams: right of a region's last column lies the first of the next, whose
    tokens were made long ago (16 of 240 pairs at n = 4 on a 16x16 grid).  With `slots: input` a slot also sees the
    tokens made together with its own, which in 1d layout are most of its targets.
    """
    counts = [[0, 0] for _ in range(config.heads)]
    for pair in pairs(config, grid, par_tokens):
        counts[pair.head][0] += pair.decoded
        counts[pair.head][1] += 1
    return [(decoded, whole) for decoded, whole in counts]


def seam_notes(config: ForesightConfig, model: ModelConfig) -> list[str]:
    """What a run says once at its start about targets that are decoded already; nothing where there are none."""
    if not config.active:
        return []
    counts = decoded_targets(config, model.grid, model.par_tokens)
    seams = [
        f"down {down} right {right}: {decoded} of {whole} ({decoded / whole:.1%})"
        for (down, right), (decoded, whole) in zip(offsets(config), counts, strict=True)
        if decoded
    ]
    if not seams:
        return []
    fate = "left out" if config.mask_decoded_targets else "kept (foresight.mask_decoded_targets: true leaves them out)"
    return [f"foresight: targets that are decoded already, {fate}: {'; '.join(seams)}"]
