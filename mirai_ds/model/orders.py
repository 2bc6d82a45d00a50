"""The orders by what the configuration says.  A new one is a subclass of `TokenOrder` and a line here."""

from __future__ import annotations

from mirai_ds.model.order import TokenOrder
from mirai_ds.model.par import ParOrder


def token_order(grid: int, par_tokens: int | None = None) -> TokenOrder:
    """The order of a model on a grid x grid image: PAR's with `par_tokens` at once, else raster order."""
    return TokenOrder(grid) if par_tokens is None else ParOrder(grid, par_tokens)
