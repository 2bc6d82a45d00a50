"""What a mistake in a recipe is, and the small recipes that mistakes are made in."""

from __future__ import annotations

from typing import NamedTuple


class Mistake(NamedTuple):
    """A recipe's text, `--set` arguments, and parts of the one-line message."""

    text: str
    parts: tuple[str, ...]
    overrides: tuple[str, ...] = ()


def recipe(text: str, *parts: str) -> Mistake:
    """A mistake in the recipe itself."""
    return Mistake(text, parts)


def given(override: str, *parts: str, text: str = "") -> Mistake:
    """A mistake in a `--set`."""
    return Mistake(text, parts, (override,))


TINY = "model: {size: custom, dim: 32, n_layer: 4, n_head: 2, block_size: 16}\n"
MIRAI = TINY + "foresight: {method: mirai-e, warmup_epochs: 0}\n"
PAPER = TINY + "foresight: {method: mirai-e, warmup_epochs: 0, convention: paper}\n"
