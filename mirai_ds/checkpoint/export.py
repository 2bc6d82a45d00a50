"""The weights of a run or a file, written for LlamaGen's own samplers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mirai_ds.checkpoint.llamagen import write_llamagen
from mirai_ds.checkpoint.weights import load_weights
from mirai_ds.config import UserError
from mirai_ds.config.eval_config import Weights


def export_weights(
    source: Path, out: Path, weights: Literal["raw", "ema", "both"] | None, step: int | None, heads: bool,
    recipe: str | None,
) -> str:  # fmt: skip
    """weights: raw, ema (under "model") or both ("model" and "ema"); None: all that the source has.  heads: with
    `projectors.*`.  Returns a line that says what was written.  Raises UserError."""
    kind: Weights | None = None if weights in (None, "both") else weights  # type: ignore[assignment]
    first = load_weights(source, kind, step, recipe, heads=heads)
    sets = {first.kind: first.gpt}
    if kind is None and len(first.held) == 2:
        same = first.step if source.is_dir() else None  # the run may go on meanwhile
        for other in set(first.held) - {first.kind}:
            sets[other] = load_weights(source, other, same, recipe, heads=heads).gpt
    elif weights == "both":
        raise UserError(f"--weights both: {source} has {first.kind!r} weights only; leave it out")
    both = len(sets) == 2
    named = "both" if both else first.kind
    name = {"recipe": first.config.name} if first.data is not None else {}
    info = {**name, "weights": named, **first.model}
    write_llamagen(out, sets.get("raw", first.gpt), sets["ema"] if both else None, first.step, info)
    return f"{out}: {len(first.gpt)} tensors of {named} weights, step {first.step}"
