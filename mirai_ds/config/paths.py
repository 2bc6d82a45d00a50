"""Which fields name files and folders, and that a run which has begun means the same ones from everywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mirai_ds.config.data_config import SOURCES
from mirai_ds.config.errors import ConfigError
from mirai_ds.config.load import build
from mirai_ds.config.own import is_own
from mirai_ds.config.run_config import RunConfig

# `deepspeed` is one where there is such a file, else the name of one that ships.
PATHS = (
    "output_dir", "data.path", "data.more_views", "data.held_out_path", "data.images", "data.tokenizer",
    "foresight.teacher_weights", "foresight.encoder.weights", "train.init_from",
    "eval.fid.features_weights", "eval.fid.reference",
)  # fmt: skip

_STORES = ("data.path", "data.held_out_path", "data.more_views")  # where data.source is one


def absolute_paths(config: RunConfig) -> RunConfig:
    """The same run with relative paths taken from the current folder.

    Of data that a function of the user's own makes, the fields are that function's, and are left as they are.
    """
    data = config.model_dump(mode="json")
    for name in PATHS:
        *sections, field = name.split(".")
        here = data
        for section in sections:
            here = here.get(section) or {}
        given = here.get(field)
        if given and not (sections == ["data"] and is_own(config.data.source)):
            several = isinstance(given, list)
            here[field] = [os.path.abspath(path) for path in given] if several else os.path.abspath(given)
    if isinstance(config.deepspeed, str) and Path(config.deepspeed).is_file():
        data["deepspeed"] = os.path.abspath(config.deepspeed)
    return build(data)


def refuse_missing(config: RunConfig, started: bool) -> None:
    """Raises ConfigError for the first file or folder that the run would read and that is not here.

    started: it goes on from a checkpoint, and does not read `train.init_from`.  What objects of the user's own read is
    not known.  A DeepSpeed file is read, and refused, where the configuration is loaded.
    """
    encoder = config.foresight.encoder
    unread = {
        "output_dir": True, "data.": is_own(config.data.source), "train.init_from": started,
        "foresight.": not config.foresight.active, "foresight.encoder.": encoder is not None and is_own(encoder.name),
        "eval.fid.": not (config.eval.fid.active or config.checkpoint.judged_by_fid),
    }  # fmt: skip
    left_out = tuple(name for name, holds in unread.items() if holds)
    for name, path in _given(config):
        if name.startswith(left_out):
            continue
        if not os.path.exists(path):  # of a name that cannot be one Path.exists raises
            raise ConfigError(name, path, "no such file or folder")
        holds = SOURCES[config.data.source].holds if name in _STORES else ""
        if holds and not os.path.exists(os.path.join(path, holds)):
            raise ConfigError(name, path, f"holds no {holds}: it is no store, or not finished")


def _given(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(field, path) of every file and folder that the configuration names."""
    data = config.model_dump(mode="json")
    for name in PATHS:
        value: Any = data
        for part in name.split("."):
            value = (value or {}).get(part)
        for path in value if isinstance(value, list) else [value] if value else []:
            yield name, path


def named_paths(config: RunConfig) -> list[str]:
    """Every file and folder that the configuration names, the DeepSpeed file too, as they are given."""
    deepspeed = [config.deepspeed] if isinstance(config.deepspeed, str) and os.path.isfile(config.deepspeed) else []
    stage = [config.data.stage] if config.data.stage and "$" not in config.data.stage else []
    return [path for _, path in _given(config)] + deepspeed + stage
