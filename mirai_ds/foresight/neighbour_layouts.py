"""What a head's offset means: a step on the grid, or along the sequence.

A layout is an entry of `LAYOUTS`, or an object of the user's own that the configuration names.
"""

from __future__ import annotations

import heapq
from functools import lru_cache, partial

from mirai_ds.config import ConfigError, ForesightConfig
from mirai_ds.config.foresight_config import MAX_HEADS
from mirai_ds.config.own import import_own
from mirai_ds.model.order import CellOrder

Offset = tuple[int, int]

# The authors' order of heads (flat shifts 0, +1, +16, +17, +2, +18, +34, +33, +32 on a 16 grid).
OFFICIAL_OFFSETS = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0))
# The down-right quadrant by (dr^2 + dc^2, dr, dc): the only reading of Eq. 8 without ties at K = 1, 3, 4, 9.
NEAREST_OFFSETS = tuple(sorted(OFFICIAL_OFFSETS, key=lambda o: (o[0] ** 2 + o[1] ** 2, *o)))


def _nearness(down: int, right: int) -> tuple[int, int, int]:
    """What Eq. 8 sorts by, the squared distance; ties, which it leaves open: the upper cell, then the right one."""
    return down**2 + right**2, down, -right


# Later cells in raster order, nearest first, where no edge is near: the fifth lies down-left, as near as the fourth.
LATER_OFFSETS = tuple(
    sorted(
        ((down, right) for down in range(4) for right in range(-3, 4) if down or right >= 0),
        key=lambda o: _nearness(*o),
    )[: MAX_HEADS + 1]
)


@lru_cache(maxsize=4)
def nearest_later(cells: tuple[int, ...], count: int) -> list[list[int]]:
    """Of each token of a sequence the numbers of the `count` nearest tokens on the grid that are not earlier, itself
    first; fewer at the end.  cells: raster number of each token's cell on a square grid."""
    side = round(len(cells) ** 0.5)
    places = [divmod(cell, side) for cell in cells]

    def nearness(token: int, other: int) -> tuple[int, int, int]:
        return _nearness(places[other][0] - places[token][0], places[other][1] - places[token][1])

    return [
        heapq.nsmallest(count, range(token, len(cells)), key=partial(nearness, token)) for token in range(len(cells))
    ]


class NeighbourLayout:
    """Neighbours on the grid (`2d`), and the base of others."""

    def offsets(self, config: ForesightConfig) -> list[Offset]:
        """(rows down, columns right) of each head: the config's own if given.  Of mtp without (0, 0), the next token,
        which needs no head."""
        if config.offsets is not None:
            return [(down, right) for down, right in config.offsets]
        if config.border == "nearest":  # of cells far from the edges
            return list(LATER_OFFSETS[config.first_neighbour : config.first_neighbour + config.heads])
        order = OFFICIAL_OFFSETS if config.head_order == "official" else NEAREST_OFFSETS
        return list(order[config.first_neighbour : config.first_neighbour + config.heads])

    def target(self, config: ForesightConfig, order: CellOrder, token: int, offset: Offset) -> int | None:
        """Number in the sequence of the token that a head with `offset` looks at from the `token`-th; None: there is
        none.  It may lie beyond the last token."""
        cells = len(order.cell)
        if config.border == "nearest":
            rank = self.offsets(config).index(offset) + config.first_neighbour
            later = nearest_later(tuple(order.cell), MAX_HEADS + 1)[token]
            return later[rank] if rank < len(later) else None
        cell = target_cell(order.cell[token], offset, round(cells**0.5), config)
        return order.number[cell] if cell >= 0 else None


class SequenceLayout(NeighbourLayout):
    """`1d`: (0, k) is k tokens later in the sequence, whatever lies there on the grid."""

    def offsets(self, config: ForesightConfig) -> list[Offset]:
        """(0, k) for k = 0, 1, 2, ...; of mtp from 1 on."""
        first = config.first_neighbour
        return [(0, k) for k in range(first, first + config.heads)]

    def target(self, config: ForesightConfig, order: CellOrder, token: int, offset: Offset) -> int | None:
        """See `NeighbourLayout.target`."""
        return token + offset[1]


LAYOUTS: dict[str, NeighbourLayout] = {"2d": NeighbourLayout(), "1d": SequenceLayout()}


def layout_of(config: ForesightConfig) -> NeighbourLayout:
    """The configured layout.  Raises ConfigError for an own one that cannot be imported or is none."""
    if config.layout in LAYOUTS:
        return LAYOUTS[config.layout]
    made = import_own(config.layout, "foresight.layout")
    if not isinstance(made, NeighbourLayout):
        raise ConfigError("foresight.layout", config.layout, "is no instance of a NeighbourLayout")
    return made


def target_cell(cell: int, offset: Offset, grid: int, config: ForesightConfig) -> int:
    """Raster number of the cell at `offset` from `cell` on the grid, or -1 where the border rule gives none."""
    down, right = offset
    if config.border == "wrap":
        shifted = cell + down * (config.flat_stride or grid) + right
        return shifted if shifted < grid * grid else -1
    row, column = cell // grid + down, cell % grid + right
    if config.border == "clamp":
        row, column = min(row, grid - 1), min(max(column, 0), grid - 1)
    return row * grid + column if row < grid and 0 <= column < grid else -1
