"""Which fields name files and folders, and that a run which has begun means the same ones from everywhere."""

from __future__ import annotations

import os
from pathlib import Path

from mirai_ds.config.load import build
from mirai_ds.config.own import is_own
from mirai_ds.config.run_config import RunConfig

# `deepspeed` is one where there is such a file, else the name of one that ships.
PATHS = (
    "output_dir", "data.path", "data.more_views", "data.held_out_path", "data.images", "data.tokenizer",
    "foresight.teacher_weights", "foresight.encoder.weights", "train.init_from",
    "eval.fid.features_weights", "eval.fid.reference",
)  # fmt: skip


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
