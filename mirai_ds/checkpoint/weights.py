"""Whole weights of a run or a file, for the tools that need no engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from mirai_ds.checkpoint import store
from mirai_ds.checkpoint.format import StateReader
from mirai_ds.checkpoint.gpt_file import PROJECTORS, GptFile, read_gpt_file
from mirai_ds.checkpoint.llamagen import check_gpt_weights, check_told, infer_model_config
from mirai_ds.checkpoint.model_folder import is_model_folder, read_model_folder
from mirai_ds.config import DataConfig, ModelConfig, RunConfig, UserError, load
from mirai_ds.config.errors import from_validation
from mirai_ds.config.eval_config import Weights
from mirai_ds.runs.configuration import read_run_config

BLOCK_SIZE = 256  # tokens an image, where nobody says


@dataclass(frozen=True)
class LoadedWeights:
    """Weights by official key, the configuration they belong to, and where they came from.

    gpt: with `projectors.*` where those were asked for.  kind: which of those `held` at the source they are.  data:
    what they were trained on; None: of a file nobody says.  model: the fields of `config.model` that are known.
    codebook: the file that shows their tokens, and classes: the names of their labels, where those lie beside them.
    """

    gpt: dict[str, Tensor]
    config: RunConfig
    origin: str
    step: int
    kind: Weights
    held: tuple[Weights, ...]
    data: DataConfig | None
    model: dict[str, Any]
    codebook: Path | None = None
    classes: tuple[str, ...] | None = None


def checkpoint_of(run: Path, step: int | str | None) -> tuple[Path, int, RunConfig]:
    """Folder and step of a run's verified checkpoint, the newest whole one by default, and the run's configuration with
    the model and the method that this checkpoint was trained with: a later start may have changed them."""
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder")
    config = read_run_config(run)
    folder, info, _ = store.find(run, "auto" if step is None else str(step))
    trained = store.config_of(folder, info)
    return folder, info.step, config.model_copy(update={"model": trained.model, "foresight": trained.foresight})


def checkpoint_weights(folder: Path, kind: Weights, heads: bool) -> dict[str, Tensor]:
    """Of a checkpoint's folder, by official key; heads: `projectors.*` too."""
    reader, stored = StateReader(folder), "ema" if kind == "ema" else "master"
    found = reader.weights(stored, PROJECTORS) if heads else {}
    return reader.weights(stored) | {f"{PROJECTORS}{name}": value for name, value in found.items()}


def load_weights(
    source: Path, kind: Weights | None = None, step: int | None = None, recipe: str | None = None,
    block_size: int | None = None, heads: bool = False,
) -> LoadedWeights:  # fmt: skip
    """From a run folder, a model's folder, or a weights file.  kind: default `sampling.weights` of the run or recipe,
    else the average; of a file that has only the other, that one.

    A file's model is the recipe's, the one that the file states, or the one that its shapes tell, which LlamaGen's
    sizes are.  `block_size`, tokens an image, they cannot tell.  Raises UserError.
    """
    if is_model_folder(source):
        return _of_model_folder(source, kind, {"--step": step, "--recipe": recipe, "--block-size": block_size}, heads)
    if source.is_dir():
        if recipe is not None:
            raise UserError(f"--recipe {recipe}: {source} is a run, which holds its own configuration; leave it out")
        folder, steps, config = checkpoint_of(source, step)
        kind = kind or config.sampling.weights
        return LoadedWeights(
            checkpoint_weights(folder, kind, heads), config, f"{folder} ({kind} weights)", steps, kind, ("raw", "ema"),
            config.data, config.model.model_dump(mode="json"),
        )  # fmt: skip
    if step is not None:
        raise UserError(f"--step {step}: {source} is a file, not a run with checkpoints; leave it out")
    given = None if recipe is None else load(recipe)
    file = read_gpt_file(source, kind or (given or RunConfig()).sampling.weights, or_other=kind is None)
    if given is None:
        model = _model_of(file, source, block_size)
        known = model.model_dump(mode="json")
        if not file.model and block_size is None:
            known = {name: value for name, value in known.items() if name not in ("block_size", "grid_size")}
    else:
        model = given.model
        known = model.model_dump(mode="json")
        check_told(file.model, model, source)
    check_gpt_weights(file.weights, model, source)
    weights, data = _without_heads(file.weights, heads), None if given is None else given.data
    return LoadedWeights(
        weights, given or RunConfig(model=model), f"{source} ({file.kind} weights)", file.steps, file.kind, file.held,
        data, known,
    )  # fmt: skip


def _of_model_folder(source: Path, kind: Weights | None, given: dict[str, Any], heads: bool) -> LoadedWeights:
    for option, value in given.items():
        if value is not None:
            raise UserError(f"{option} {value}: {source} says itself what it holds; leave it out")
    file, config, codebook, classes = read_model_folder(source, kind)
    check_gpt_weights(file.weights, config.model, source)
    return LoadedWeights(
        _without_heads(file.weights, heads), config, f"{source} ({file.kind} weights)", file.steps, file.kind,
        file.held, None, config.model.model_dump(mode="json"), codebook, classes,
    )  # fmt: skip


def _without_heads(weights: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if keep or not name.startswith(PROJECTORS)}


def _model_of(file: GptFile, path: Path, block_size: int | None) -> ModelConfig:
    """As the file states it, else by the shapes."""
    told = file.model.get("block_size")
    if None not in (told, block_size) and told != block_size:
        raise UserError(f"{path}: has {told} tokens an image, not {block_size}; leave --block-size, --image-size out")
    if not file.model:
        try:
            return infer_model_config(file.weights, block_size or BLOCK_SIZE)
        except UserError as error:
            raise UserError(f"{path}: {error}; say --recipe NAME_OR_FILE") from None
    try:
        return ModelConfig(**{"block_size": block_size or BLOCK_SIZE, **file.model})
    except ValidationError as error:
        raise from_validation(error, ModelConfig, f"{path}: what it says of its model") from None
