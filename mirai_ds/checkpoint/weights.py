"""Whole weights of a run or a file, for the tools that need no engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mirai_ds.checkpoint import store
from mirai_ds.checkpoint.format import StateReader
from mirai_ds.checkpoint.llamagen import check_gpt_weights, infer_model_config, read_gpt_weights
from mirai_ds.config import RunConfig, UserError, load
from mirai_ds.runs.configuration import read_run_config


@dataclass(frozen=True)
class LoadedWeights:
    """GPT weights by official key, the configuration they belong to, and where they came from."""

    gpt: dict[str, Tensor]
    config: RunConfig
    origin: str
    step: int


def checkpoint_of(run: Path, step: int | None) -> tuple[Path, int]:
    """Folder and step of a run's verified checkpoint, the newest whole one by default."""
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder")
    folder, info, _ = store.find(run, "auto" if step is None else str(step))
    return folder, info.step


def load_weights(source: Path, kind: str, step: int | None, recipe: str | None, block_size: int = 256) -> LoadedWeights:
    """From a run folder, or a weights file.  kind: raw or ema.

    Without `recipe` a file's model is told by its shapes, which LlamaGen's sizes are; `block_size` (tokens an image)
    they cannot tell.
    """
    if source.is_dir():
        config = read_run_config(source)
        folder, steps = checkpoint_of(source, step)
        weights = StateReader(folder).weights("ema" if kind == "ema" else "master")
        return LoadedWeights(weights, config, f"{folder} ({kind} weights)", steps)
    weights = read_gpt_weights(source, "ema" if kind == "ema" else "model")
    if recipe is None:
        try:
            config = RunConfig(model=infer_model_config(weights, block_size))
        except UserError as error:
            raise UserError(f"{source}: {error}; say --recipe NAME_OR_FILE") from None
    else:
        config = load(recipe)
    check_gpt_weights(weights, config.model, source)
    gpt = {name: value for name, value in weights.items() if not name.startswith("projectors.")}
    return LoadedWeights(gpt, config, str(source), 0)
