"""In which order a network reads the tokens of an image: what lies between raster order outside and slots inside.

An order is an object; `model/orders.py` picks the configured one, and nothing else asks which it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

Learnable = Callable[[int], Tensor]  # batch -> (batch, m, D)


class CellOrder(NamedTuple):
    """Where the cells of a grid stand in the sequence of a model.  q counts tokens of the sequence from 0."""

    number: list[int]  # q of each cell, cells in raster order
    cell: list[int]  # raster number of the q-th token
    input_slot: list[int]  # slot that holds the q-th token; slot q predicts it
    seen_before: list[int]  # how many tokens, from the first on, the slot that predicts the q-th sees
    seen_with: list[int]  # how many the slot that holds it sees
    slots: int  # of the input in training, which has all tokens but the last


class TokenOrder:
    """Raster order, a token a step, each slot seeing those before it: LlamaGen's, and the base of others.

    slot    0      1 .. N
    holds   class  x_0 .. x_{N-1}      (slot p predicts x_p)
    """

    one_by_one = True  # whether each decoding step is one slot: what `model.decoding.Decoder` can capture

    def __init__(self, grid: int) -> None:
        """grid: the side of the token grid."""
        self.grid, self.cells = grid, grid * grid

    def learnable_tokens(self, dim: int) -> nn.Module | None:
        """What gives embeddings (B, m, D) of slots that hold neither the class nor a token; None: there are none."""
        return None

    def to_sequence(self, tokens: Tensor) -> Tensor:
        """(B, T, ...) in raster order -> the sequence's.  T is N - 1 or N where the orders differ, else anything."""
        return tokens

    def to_raster(self, x: Tensor) -> Tensor:
        """(B, N, ...), the inverse of `to_sequence`."""
        return x

    def arrange(self, x: Tensor, learnable: Learnable | None) -> Tensor:
        """(B, 1 + T, D) of the class and the sequence's tokens -> (B, slots, D), the learnable ones put in."""
        return x

    def predictions(self, x: Tensor) -> Tensor:
        """The last block's output (B, slots, D) -> (B, cells, D): the states that predict each raster cell's token."""
        return x

    def rope(self, table: Tensor) -> Tensor:
        """(1 + N, ...) for the class and cells in raster order -> (slots, ...)."""
        return table

    def mask(self) -> Tensor | None:
        """(slots, slots) bool, True where a slot (row) sees another; None: causal."""
        return None

    def positions(self) -> CellOrder:
        """Which slot stands for which cell, and what it sees."""
        places, after = list(range(self.cells)), list(range(1, self.cells + 1))
        return CellOrder(places, places, after, places, after, self.cells)

    def decoding_steps(self) -> Iterator[tuple[int, int]]:
        """(first slot, slots) of each forward pass of sampling; the first is the class alone."""
        return ((slot, 1) for slot in range(self.cells))

    def step_input(self, made: Tensor, start: int, embed: nn.Module, learnable: Learnable | None) -> Tensor:
        """(B, S, D) for the step whose first slot is `start` > 0, given the tokens made so far, (B, start) in the
        sequence's order."""
        return embed(made[:, -1:])
