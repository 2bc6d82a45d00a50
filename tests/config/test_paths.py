"""What a configuration names by a path, and that such a path means the same from everywhere once a run has begun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from mirai_ds.config import RunConfig, build, dump, load
from mirai_ds.config.paths import PATHS, absolute_paths

# Text that names no file.  A new field of text belongs here or into PATHS.
NAMES = {
    "name", "model.size", "data.source", "foresight.method", "foresight.layout", "foresight.encoder.name",
    "checkpoint.best_metric", "eval.fid.features", "deepspeed", "hooks", "data.stage", "tracking",
}  # fmt: skip


def text_fields(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        kinds = get_args(field.annotation) or (field.annotation,)
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if inner is not None:
            yield from text_fields(inner, f"{prefix}{name}.")
        elif str in kinds:
            yield f"{prefix}{name}"


def test_every_field_of_text_is_a_path_or_a_name() -> None:
    assert set(text_fields(RunConfig)) == set(PATHS) | NAMES


def test_paths_are_taken_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text("{}")
    given = {
        "data": {
            "source": "store", "path": "codes", "more_views": ["more", "/others"], "held_out_path": "../val",
            "images": "images", "tokenizer": "/t.pt",
        },
        "foresight": {"method": "mirai-i", "encoder": {"name": "dinov2-b", "weights": "dino.pth"}},
        "train": {"init_from": "runs/a"}, "eval": {"fid": {"features_weights": "inc.pth", "reference": "real"}},
        "deepspeed": "mine.json",
    }  # fmt: skip
    found = absolute_paths(build(given))
    here = str(tmp_path)
    assert (found.data.path, found.data.images, found.data.tokenizer) == (f"{here}/codes", f"{here}/images", "/t.pt")
    assert found.data.more_views == [f"{here}/more", "/others"]
    assert found.data.held_out_path == os.path.join(os.path.dirname(here), "val")
    assert found.foresight.encoder is not None
    assert (found.foresight.encoder.name, found.foresight.encoder.weights) == ("dinov2-b", f"{here}/dino.pth")
    assert (found.train.init_from, found.output_dir) == (f"{here}/runs/a", f"{here}/runs")
    assert (found.eval.fid.features_weights, found.eval.fid.reference) == (f"{here}/inc.pth", f"{here}/real")
    assert found.deepspeed == f"{here}/mine.json"
    monkeypatch.chdir("/")
    assert dump(absolute_paths(found)) == dump(found)


def test_names_are_no_paths() -> None:
    config = load("digits-mirai-e", ["foresight.teacher_weights=t.pt"])
    found = absolute_paths(config)
    assert (found.deepspeed, found.data.source, found.name) == (config.deepspeed, "digits", config.name)
    assert found.foresight.teacher_weights == os.path.abspath("t.pt")
    own = build({"data": {"source": "some.module:make", "path": "table-7"}})
    assert absolute_paths(own).data.path == "table-7"  # what it means is the function's
