"""A folder that holds one model and says what it is: what `mirai-ds export --format hf` writes, read again.

config.json: the configuration, the weights' kind and step.  model.safetensors: the weights, fp32, official keys.
README.md: the model card.  codebook.npz: what shows its tokens, where that is a patch codebook.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from mirai_ds.checkpoint.gpt_file import GptFile, read_gpt_file
from mirai_ds.config import RunConfig, UserError, build
from mirai_ds.config.eval_config import Weights

CONFIG, WEIGHTS, CODEBOOK, CARD = "config.json", "model.safetensors", "codebook.npz", "README.md"
MODEL_TYPE = "mirai_ds"


class ModelFolder(NamedTuple):
    """What is in one.  codebook: the file, classes: names in label order; None where there are none."""

    file: GptFile
    config: RunConfig
    codebook: Path | None
    classes: tuple[str, ...] | None


def is_model_folder(path: Path) -> bool:
    """Whether `path` is a folder with a model of this package in it; a run's folder is none."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def weights_file(path: Path) -> Path:
    """The file with the weights in a model's folder; `path` itself where it is no such folder."""
    return path / WEIGHTS if is_model_folder(path) else path


def read_model_folder(path: Path, kind: Weights | None) -> ModelFolder:
    """kind: default what it holds.  Raises UserError when it is damaged, another program's, or has no such weights."""
    try:
        told: Any = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path / CONFIG}: cannot be read ({error})") from None
    if not isinstance(told, dict) or told.get("model_type") != MODEL_TYPE or not isinstance(told.get("recipe"), dict):
        raise UserError(f"{path}: is no model of mirai_ds (its {CONFIG} does not say model_type: {MODEL_TYPE})")
    config = build(told["recipe"], str(path / CONFIG))
    file = read_gpt_file(path / WEIGHTS, kind or "ema", or_other=kind is None)
    codebook = path / CODEBOOK
    names = told.get("classes")
    classes = tuple(map(str, names)) if isinstance(names, list) else None
    return ModelFolder(file, config, codebook if codebook.is_file() else None, classes)
