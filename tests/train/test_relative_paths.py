"""A run that was started with relative paths: looked at and continued from another folder, and from its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from mirai_ds.runs.configuration import read_run_config
from tests.train.conftest import records
from tests.warm_start import Done, warm_mirai_ds

TINY = """\
name: tiny
model: {size: custom, dim: 32, n_layer: 2, n_head: 2, vocab_size: 16, num_classes: 4, block_size: 16, init_std: 0.08}
data: {source: npz, path: data/codes.npz}
train: {max_steps: 2, global_batch_size: 8, precision: fp32}
checkpoint: {every_steps: 1}
deepspeed: ds.json
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its data, and the run in runs/tiny."""
    home, draw = tmp_path_factory.mktemp("home"), np.random.default_rng(0)
    (home / "data").mkdir()
    np.savez(
        home / "data" / "codes.npz", codes=draw.integers(0, 16, (80, 16)), labels=np.arange(80) % 4,
        codebook=draw.integers(0, 256, (16, 2, 2, 3), dtype=np.uint8),
    )  # fmt: skip
    (home / "mine.yaml").write_text(TINY)
    (home / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    done = train(home, "mine.yaml")
    assert done.code == 0, done.err[-3000:]
    return home


def train(cwd: Path, recipe: Path | str, *extra: str) -> Done:
    return warm_mirai_ds("train", str(recipe), "--ranks", "1", *extra, cwd=cwd)


def test_everything_is_found_from_elsewhere(home: Path, tmp_path: Path) -> None:
    run = home / "runs" / "tiny"
    config = read_run_config(run)
    assert (config.data.path, config.output_dir) == (str(home / "data" / "codes.npz"), str(home / "runs"))
    assert config.deepspeed == str(home / "ds.json")
    for verb in (
        ["sample", run, "--per-class", "1", "--classes", "1", "--out", "grid"],
        ["sample", run, "--num", "2", "--out", "x.npz"],
        ["map", run, "--method", "pca", "--out", "m.png"],
    ):  # fmt: skip
        done = warm_mirai_ds(*map(str, verb), cwd=tmp_path)
        assert done.code == 0, done.err
    assert {path.name for path in tmp_path.iterdir()} >= {"grid", "x.npz", "m.png"}
    assert (tmp_path / "grid" / "grid.png").is_file()
    more = train(tmp_path, run / "config.yaml", "--resume", "auto", "--set", "train.max_steps=3")
    assert more.code == 0, more.err[-3000:]
    assert [r["step"] for r in records(run) if "loss/total" in r][-1] == 3
    assert not (tmp_path / "runs").exists()


def test_the_same_recipe_from_the_same_folder_changes_nothing(home: Path) -> None:
    run = home / "runs" / "tiny"
    for number, max_steps in enumerate((4, 4, 5)):
        text = yaml.safe_load((run / "config.yaml").read_text())
        if number == 2:  # of a version that stored them as they were given
            text |= {"output_dir": "runs", "deepspeed": "ds.json"}
            text["data"]["path"] = "data/codes.npz"
            (run / "config.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
        before = len(list(run.glob("config.before-*")))
        done = train(home, "mine.yaml", "--resume", "auto", "--set", f"train.max_steps={max_steps}")
        assert done.code == 0, done.err[-3000:]
        assert len(list(run.glob("config.before-*"))) - before == (number != 1)
    assert read_run_config(run).data.path == str(home / "data" / "codes.npz")
